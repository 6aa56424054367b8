"""A checkpoint engine for verl (0.8 and later), registered as "mbridge" by importing this module.

    actor_rollout_ref.rollout.checkpoint_engine.backend=mbridge
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=mbridge_rl.integrations.verl

Weights are sent from actor rank 0 to all rollout workers in verified buckets (`integrations.broadcast`), over gloo or NCCL,
without cupy or ZeroMQ. Actors with a bridge of this package gather the weights on rank 0 only.
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
from mbridge_rl.distributed.rendezvous import GroupAddress, new_secret, own_address, serve_store
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
    """The checkpoint engine of one actor or one rollout worker.

    Args:
        bucket_size: bytes of one bucket (verl's `update_weights_bucket_megabytes`); two are staged at once.
        is_master: whether this is actor rank 0, which sends.
        verify: whether every bucket has a digest, which every receiver checks.
        timeout: seconds, for every single wait.
        backend: the backend of torch.distributed; `None` means nccl if every worker has a GPU, otherwise gloo.
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
        self._group: GroupAddress | None = None
        self._rank: int | None = None

    def prepare(self) -> dict[str, Any]:
        """This worker's metadata for `build_topology`, in plain JSON types. Buckets are allocated when they are filled."""
        metadata = {"member": self._member, "cuda": torch.cuda.is_available(), "backend": self._backend}
        if self._server is None:
            return metadata
        return {**metadata, "host": self._server.host, "port": self._server.port, "secret": self._secret}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Makes the arguments of every worker's `init_process_group`. Rank 0 is actor rank 0, then come the rollout workers;
        the other actors (-1) only take part in the export.

        Raises:
            SyncError: actor rank 0 was not made with `is_master`, or workers are missing.
        """
        if len(metadata) != actor_wg_world_size + rollout_world_size:
            raise SyncError(f"{len(metadata)} workers are prepared, {actor_wg_world_size} + {rollout_world_size} were expected")
        master, members = metadata[0], [metadata[0], *metadata[actor_wg_world_size:]]
        if "port" not in master:
            raise SyncError("actor rank 0 must be made with is_master=True: it is the one that sends")
        on_gpus = all(member["cuda"] for member in members)
        # The same members use their existing group again; with other members it is another group.
        name = hashlib.blake2b("".join(member["member"] for member in members).encode(), digest_size=8).hexdigest()
        group = GroupAddress(
            host=master["host"],
            port=master["port"],
            group=name,
            secret=master["secret"],
            backend=master["backend"] or ("nccl" if on_gpus else "gloo"),
            size=1 + rollout_world_size,
        )
        actors = {"rank": [0] + [-1] * (actor_wg_world_size - 1), "group": [group] * actor_wg_world_size}
        rollout = {"rank": list(range(1, 1 + rollout_world_size)), "group": [group] * rollout_world_size}
        return actors, rollout

    def init_process_group(self, rank: int, group: GroupAddress) -> None:
        """Joins the group; all members call it together. A group that exists already is kept.

        Raises:
            TransferTimeout: not all members joined.
        """
        if self._group is not None and self._rank is not None and group != self._group:
            leave(self._group, self._rank)
        self._rank, self._group = rank, group
        if rank >= 0:
            self._channel = Broadcast(group, rank, bucket_bytes=self._bucket_size, verify=self._verify, timeout=self._timeout)

    def finalize(self) -> None:
        """Frees everything but the group until the next update."""
        self._channel = None

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        """Sends the tensors of an actor's `get_per_tensor_param`; all actors call it, and read their streams to the end.

        Returns:
            Metrics for verl's log on the actor that sends; empty on the others.

        Raises:
            TransferTimeout: a receiver did not take part.
            Exception: whatever `weights` raises, which is also sent to the receivers.
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
            _read_to_the_end(weights)  # the other actors take part in the same export, and would wait for this one
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
        """Yields `(name, tensor)`; the consumer may keep each tensor. Raises the errors of `Broadcast.receive`."""
        if self._channel is None or self._rank == 0:
            raise SyncError("only rollout workers receive weights, after init_process_group")
        with _new_member_on_failure(self):
            async for name, tensor in self._channel.receive(global_steps):
                yield name, tensor


def _read_to_the_end(weights: Any) -> None:
    for _ in weights:
        pass


class _new_member_on_failure:
    """Gives the worker another member name if the block fails. The group of a failed update cannot be used any more, and with
    the new name the next update makes a new group."""

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
    """The return value of `BaseEngine.get_per_tensor_param` for a live Megatron model: the stream, and the adapters' PEFT
    config.

    Args:
        adapters_only: whether only the adapters are exported, for rollout engines that hold the base weights; otherwise they
            are merged.

    Raises:
        StateMismatchError: `adapters_only` is set, and the model has no adapters.
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
        "target_modules": "all-linear",  # rollout engines adapt the modules of the received adapters
        "lora_dropout": 0.0,
        "bias": "none",
    }

    def start(ranks: Sequence[int] | None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in bridge.export_adapter_weights(model, ranks=ranks):
            yield name.removeprefix("base_model.model."), tensor

    return HFStream(start), peft_config
