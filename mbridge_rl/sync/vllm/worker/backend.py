"""The weight-transfer backend "mbridge": the engine that vLLM makes in each worker, which holds our receiver.

Weights reach it only by planned syncs (`worker.calls`, `sync.worker.payload_receiver`); it refuses vLLM's own three calls of an
update.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from mbridge_rl.core.errors import EngineMismatch, SyncError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.compatibility import metadata_fingerprint
from mbridge_rl.sync.vllm.worker.receiver import Receiver

_PLANNED_ONLY = "the backend 'mbridge' takes weights by planned syncs (mbridge_rl.WeightSync), not by vLLM's own update calls"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The announcement that a trainer sends once.

    Attributes:
        names: the HF names of all tensors that each sync brings.
        dtypes: their dtypes, such as "bfloat16".
        shapes: their shapes, as lists.
        fingerprint: `metadata_fingerprint` of the trainer's metadata.
        config: the trainer's `config_summary`; if it is empty, configs are not compared.
        optional: names of tensors for which the engine may have no place.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    fingerprint: str
    config: dict[str, Any] = field(default_factory=dict)
    optional: list[str] = field(default_factory=list)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """An empty message, because this backend takes no weights by vLLM's `update_weights`."""


class PlannedSyncEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's weight-transfer engine; its `receiver` does the work."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = Receiver(model, vllm_config)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        metadata = parse_metadata(init_info)
        self.receiver.prepare(metadata, init_info.config or None, init_info.optional)
        self.shutdown()

    def start_weight_update(self) -> None:
        raise SyncError(_PLANNED_ONLY)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        raise SyncError(_PLANNED_ONLY)

    def finish_weight_update(self) -> None:
        raise SyncError(_PLANNED_ONLY)

    def shutdown(self) -> None:
        self.receiver.shards.close()


def parse_metadata(init_info: InitInfo) -> list[HFTensor]:
    """The announced tensors.

    Raises:
        EngineMismatch: the lists differ in length, a dtype is unknown, or the tensors have another fingerprint.
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
    fingerprint = metadata_fingerprint(metadata)
    if fingerprint != init_info.fingerprint:
        raise EngineMismatch(f"the announced tensors have fingerprint {fingerprint}, expected {init_info.fingerprint}")
    return metadata
