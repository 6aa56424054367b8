"""The weight-transfer backend "mbridge": vLLM's worker-side contract, fed through shared memory on one machine.

Everything in the two info dicts is a plain JSON type, so that they travel over a pipe, Ray or vLLM's HTTP routes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from mbridge_rl.core.errors import listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.arena import Arena
from mbridge_rl.sync.errors import EngineMismatch, SyncError
from mbridge_rl.sync.vllm.compatibility import metadata_fingerprint
from mbridge_rl.sync.vllm.receiver import Receiver


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Sent once.

    Attributes:
        names, dtypes, shapes: every HF tensor that each sync brings; dtypes as "bfloat16", shapes as lists.
        fingerprint: `metadata_fingerprint` of the trainer's metadata.
        config: the trainer's `config_summary`; empty skips the comparison.
        arena_path, arena_nbytes: the shared memory that updates lie in; empty if tensors come in process.
        verify: whether each sync proves the live weights by digest.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    fingerprint: str
    config: dict[str, Any] = field(default_factory=dict)
    arena_path: str = ""
    arena_nbytes: int = 0
    verify: bool = True


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Sent once per batch.

    Attributes:
        version: what the sync commits; the same in every batch of it.
        names: the HF tensors of this batch.
        offsets: where each lies in the arena, in bytes.
        digests: `core.digest.digest` of each, as 16 hex digits; empty means that none are sent.
        fingerprint: of the metadata that the sender was built with.
        abort: drop the open update instead; raises `SyncError`, which also makes vLLM forget the update.
    """

    version: int = 0
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    fingerprint: str = ""
    abort: bool = False


class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's engine; the work is its `receiver`'s."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = Receiver(model, vllm_config)
        self.report: dict[str, Any] | None = None
        self._tensors: dict[str, HFTensor] = {}
        self._fingerprint = ""
        self._arena: Arena | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        metadata = parse_metadata(init_info)
        self.receiver.prepare(metadata, init_info.config or None, verify=init_info.verify)
        arena = Arena.attach(init_info.arena_path, init_info.arena_nbytes) if init_info.arena_path else None
        self.shutdown()
        self._arena, self._fingerprint = arena, init_info.fingerprint
        self._tensors = {tensor.hf_name: tensor for tensor in metadata}

    def start_weight_update(self) -> None:
        """Nothing yet: the version to begin comes with the first batch."""
        if not self._tensors:
            raise SyncError("init_weight_transfer_engine has to come before start_weight_update")
        self.receiver.abort("another update started")
        self.report = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which calls `torch.accelerator.synchronize`: that raises where there is no accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if update_info.abort:
            self.receiver.abort("its sender gave it up")
            raise SyncError(f"the update to version {update_info.version} was dropped, as asked")
        if update_info.fingerprint != self._fingerprint:
            raise EngineMismatch(
                f"the sender's metadata has fingerprint {update_info.fingerprint!r}, this engine was initialized for "
                f"{self._fingerprint!r}: call init_weight_transfer_engine again"
            )
        tensors = self._views(update_info)
        digests = {name: int(text, 16) for name, text in zip(update_info.names, update_info.digests, strict=False)}
        self.receive_tensors(update_info.version, tensors, digests or None)

    def receive_tensors(self, version: int, tensors: list[tuple[str, torch.Tensor]], digests: Mapping[str, int] | None) -> None:
        """One batch that is already in this process; see `Receiver.load`."""
        if self.receiver.updating is None:
            self.receiver.begin(version)
        elif version != self.receiver.updating:
            raise SyncError(f"a batch of version {version} came amid the update to version {self.receiver.updating}")
        self.receiver.load(tensors, digests)

    def finish_weight_update(self) -> None:
        self.report = self.receiver.commit()

    def shutdown(self) -> None:
        self.receiver.shards.close()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _views(self, update: UpdateInfo) -> list[tuple[str, torch.Tensor]]:
        if self._arena is None:
            raise SyncError("this engine was initialized without an arena: it takes tensors in process only")
        unknown = [name for name in update.names if name not in self._tensors]
        if unknown:
            raise EngineMismatch(f"tensors that were not announced: {listed(unknown)}")
        if not len(update.names) == len(update.offsets) == (len(update.digests) or len(update.names)):
            raise EngineMismatch(
                f"{len(update.names)} names, {len(update.offsets)} offsets and {len(update.digests)} digests do not go together"
            )
        described = [self._tensors[name] for name in update.names]
        return [
            (tensor.hf_name, self._arena.view(offset, tensor.shape, tensor.dtype))
            for tensor, offset in zip(described, update.offsets, strict=True)
        ]


def parse_metadata(init_info: InitInfo) -> list[HFTensor]:
    """The announced tensors.

    Raises:
        EngineMismatch: the lists do not go together, a dtype is unknown, or the fingerprint is not of these tensors.
    """
    lengths = {
        "names": len(init_info.names),
        "dtypes": len(init_info.dtypes),
        "shapes": len(init_info.shapes),
    }
    if len(set(lengths.values())) > 1:
        raise EngineMismatch(f"the lists of the announced tensors differ in length: {lengths}")
    metadata = []
    for name, dtype_name, shape in zip(init_info.names, init_info.dtypes, init_info.shapes, strict=True):
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise EngineMismatch(f"{name}: {dtype_name!r} is no dtype of torch")
        metadata.append(HFTensor(name, dtype, tuple(shape)))
    found = metadata_fingerprint(metadata)
    if found != init_info.fingerprint:
        raise EngineMismatch(f"the announced tensors have fingerprint {found}, expected {init_info.fingerprint}")
    return metadata
