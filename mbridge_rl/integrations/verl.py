"""A checkpoint engine for verl (0.8 and later), registered as "mbridge" by importing this module.

    actor_rollout_ref.rollout.checkpoint_engine.backend=mbridge
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=mbridge_rl.integrations.verl

Weights go from actor rank 0 to all rollout workers in verified buckets (`integrations.broadcast`), over gloo or NCCL, without
cupy or ZeroMQ. Actors whose bridge is one of this package's gather them on rank 0 only.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import SyncError
from mbridge_rl.distributed.rendezvous import new_secret, own_address, serve_store
from mbridge_rl.integrations.broadcast import Broadcast
from mbridge_rl.integrations.common import HFStream
from mbridge_rl.sync.transports.process_group import leave

try:
    from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
except ImportError as error:
    raise ImportError(
        f"mbridge_rl.integrations.verl is loaded by verl (0.8 or later), which cannot be imported: {error}"
    ) from error

if TYPE_CHECKING:
    from mbridge_rl.bridge import AutoBridge


@CheckpointEngineRegistry.register("mbridge")
class MBridgeCheckpointEngine(CheckpointEngine):
    """One per actor and per rollout worker.

    Args:
        bucket_size: bytes of one bucket (verl's `update_weights_bucket_megabytes`); two are staged at once.
        is_master: actor rank 0, which sends.
        verify: a digest with every bucket, checked by every receiver.
        timeout: seconds, for every single wait.
        backend: of torch.distributed; `None` means nccl where every worker has a GPU.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        verify: bool = True,
        timeout: float = 600.0,
        backend: str | None = None,
    ) -> None:
        self._bucket_size, self._verify, self._timeout, self._backend = bucket_size, verify, timeout, backend
        self._member, self._secret = secrets.token_hex(8), new_secret()
        self._server = serve_store(own_address()) if is_master else None
        self._channel: Broadcast | None = None
        self._group: dict[str, Any] | None = None
        self._rank: int | None = None

    def prepare(self) -> dict[str, Any]:
        """What `build_topology` needs of this worker, in plain JSON types. Buckets are allocated as they are filled."""
        told = {"member": self._member, "cuda": torch.cuda.is_available(), "backend": self._backend}
        if self._server is None:
            return told
        return {**told, "host": self._server.host, "port": self._server.port, "secret": self._secret}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 is actor rank 0, then come the rollout workers; the other actors (-1) only take part in the export.

        Raises:
            SyncError: actor rank 0 was not made with `is_master`, or workers are missing.
        """
        if len(metadata) != actor_wg_world_size + rollout_world_size:
            raise SyncError(f"{len(metadata)} workers are prepared, {actor_wg_world_size} + {rollout_world_size} were expected")
        master, members = metadata[0], [metadata[0], *metadata[actor_wg_world_size:]]
        if "port" not in master:
            raise SyncError("actor rank 0 must be made with is_master=True: it is the one that sends")
        on_gpus = all(member["cuda"] for member in members)
        # The same members meet in the group that they have; with any other of them it is another group.
        name = hashlib.blake2b("".join(member["member"] for member in members).encode(), digest_size=8).hexdigest()
        group = {
            "group": name,
            "secret": master["secret"],
            "host": master["host"],
            "port": master["port"],
            "backend": master["backend"] or ("nccl" if on_gpus else "gloo"),
            "size": 1 + rollout_world_size,
        }
        actors = {"rank": [0] + [-1] * (actor_wg_world_size - 1), "group": [group] * actor_wg_world_size}
        rollout = {"rank": list(range(1, 1 + rollout_world_size)), "group": [group] * rollout_world_size}
        return actors, rollout

    def init_process_group(self, rank: int, group: dict[str, Any]) -> None:
        """All members together; a group that lives is kept.

        Raises:
            TransferTimeout: not all members came.
        """
        if self._group is not None and self._rank is not None and group != self._group:
            leave(self._group, self._rank)
        self._rank, self._group = rank, group
        if rank >= 0:
            self._channel = Broadcast(group, rank, bucket_bytes=self._bucket_size, verify=self._verify, timeout=self._timeout)

    def finalize(self) -> None:
        """Between two updates nothing is held but the group."""
        self._channel = None

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        """Sends what an actor's `get_per_tensor_param` yields; all actors call it, and read their streams to the end.

        Returns:
            On the actor that sends, numbers for verl's log.

        Raises:
            TransferTimeout: a receiver did not come. What `weights` raises comes out, and the receivers hear of it.
        """
        if self._rank is None or self._rank > 0:
            raise SyncError("only actors send weights, after init_process_group")
        if isinstance(weights, HFStream):
            weights.received_by([0])
        if self._channel is None:
            _read_to_the_end(weights)
            return {}
        started = time.perf_counter()
        try:
            with _new_member_on_failure(self):
                sent = await self._channel.send(weights, global_steps)
        except BaseException:
            _read_to_the_end(weights)  # the other actors are in the same export, and must not wait for this one
            raise
        seconds = time.perf_counter() - started
        return {
            "checkpoint_engine/seconds": seconds,
            "checkpoint_engine/bytes": float(sent.nbytes),
            "checkpoint_engine/gigabytes_per_second": sent.nbytes / seconds / 1e9,
            "checkpoint_engine/buckets": float(sent.buckets),
        }

    @torch.no_grad()
    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)`, each the consumer's to keep; see `Broadcast.receive` for what is raised."""
        if self._channel is None or self._rank == 0:
            raise SyncError("only rollout workers receive weights, after init_process_group")
        with _new_member_on_failure(self):
            async for name, tensor in self._channel.receive(global_steps):
                yield name, tensor


def _read_to_the_end(weights: Any) -> None:
    for _ in weights:
        pass


class _new_member_on_failure:
    """The group of a failed update is of no more use; under another name this worker makes a new one of the next."""

    def __init__(self, engine: MBridgeCheckpointEngine) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._engine._member = secrets.token_hex(8)


def per_tensor_param(
    bridge: AutoBridge, model: Sequence[nn.Module], *, adapters_only: bool = False
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any] | None]:
    """What `BaseEngine.get_per_tensor_param` returns, of a live Megatron model: the stream, and adapters' PEFT config.

    Args:
        adapters_only: the adapters alone, for rollout engines that hold the base weights; otherwise they are merged.

    Raises:
        StateMismatchError: `adapters_only`, and the model has none.
    """
    if not adapters_only:
        return HFStream(lambda ranks: bridge.export_weights(model, ranks=ranks)), None
    from peft import PeftType, TaskType

    from mbridge_rl.hf.peft import patterns_in_peft
    from mbridge_rl.megatron.lora.adapter_side import lora_config_of

    config = lora_config_of(model)
    peft_config = {
        "task_type": TaskType.CAUSAL_LM,
        "peft_type": PeftType.LORA,
        "r": config.peft_rank,
        "lora_alpha": config.peft_alpha,
        **patterns_in_peft(bridge.spec, config),
        "use_rslora": config.rslora,
        "target_modules": "all-linear",  # rollout engines adapt what they are sent
        "lora_dropout": 0.0,
        "bias": "none",
    }

    def start(ranks: Sequence[int] | None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in bridge.export_adapter_weights(model, ranks=ranks):
            yield name.removeprefix("base_model.model."), tensor

    return HFStream(start), peft_config
