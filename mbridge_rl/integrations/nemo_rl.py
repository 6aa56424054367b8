"""Adapters for both ends of NeMo-RL: a mixin for its Megatron policy worker, and a `WeightSynchronizer` for its driver.

With `RefitMixin` and `integrations.megatron_bridge.AutoBridge` as `self.megatron_bridge`, NeMo-RL's own transports
(`stream_weights_via_ipc_zmq`, `broadcast_weights_for_collective`) send this bridge's streams, and `prepare_refit_info` exports
nothing. `MBridgeSynchronizer` replaces the transports, too: every engine worker then gets only its own part, in one verified
transaction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mbridge_rl.core.errors import SyncError
from mbridge_rl.integrations.common import NotOffered, chunks_of, refuse
from mbridge_rl.sync.weight_sync import WeightSync

try:
    from nemo_rl.weight_sync.interfaces import WeightSynchronizer
except ImportError as error:
    raise ImportError(f"mbridge_rl.integrations.nemo_rl is for programs that run NeMo-RL, which fails here: {error}") from error


class RefitMixin:
    """A mixin that comes before `MegatronPolicyWorkerImpl`: `class Worker(RefitMixin, MegatronPolicyWorkerImpl)`.

    It uses the worker's `model`, `megatron_bridge` (an `integrations.megatron_bridge.AutoBridge`), `dtype`, `cfg` and
    `draft_model`.
    """

    model: Any
    megatron_bridge: Any
    dtype: torch.dtype
    cfg: dict[str, Any]
    draft_model: Any = None
    _mbridge_sync: WeightSync | None = None

    def prepare_refit_info(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """`{hf_name: (shape, dtype)}` of the tensors that the transports send, in their order. It follows from the mapping;
        nothing is exported for it.

        Raises:
            NotOffered: there is a draft model, or an fp8 KV cache with scales.
        """
        generation = self.cfg.get("generation") or {}
        kv_cache = (generation.get("vllm_cfg") or {}).get("kv_cache_dtype", "auto")
        if self.draft_model is not None or str(kv_cache).startswith("fp8"):
            raise NotOffered("prepare_refit_info knows neither draft models nor scales of an fp8 KV cache: turn them off")
        self.refit_conversion_tasks = self.megatron_bridge.get_conversion_tasks(chunks_of(self.model))
        return {task.hf_name: (torch.Size(task.shape), task.dtype) for task in self.refit_conversion_tasks}

    def mbridge_connect(self, engines: Callable[[], Sequence[Any]], options: dict[str, Any]) -> None:
        """Connects to the engines; all workers call it. `engines` makes the engines' clients, and is called on rank 0 only."""
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        client = list(engines()) if first else None
        self._mbridge_sync = WeightSync(self.megatron_bridge.bridge, chunks_of(self.model), client, dtype=self.dtype, **options)

    def mbridge_sync(self, version: int) -> dict[str, float]:
        """Commits the live weights as `version`; all workers call it. Returns metrics for NeMo-RL's log."""
        if self._mbridge_sync is None:
            raise SyncError("mbridge_connect comes before mbridge_sync: init_communicator calls it")
        report = self._mbridge_sync.sync(version)
        return {
            "seconds": report.seconds,
            "pause_seconds": report.pause_seconds,
            "bytes": float(report.nbytes),
            "gigabytes_per_second": report.gigabytes_per_second,
            "retries": float(report.retries),
            **{f"{phase}_seconds": seconds for phase, seconds in report.phases.items()},
        }

    def mbridge_close(self) -> None:
        if self._mbridge_sync is not None:
            self._mbridge_sync.close()
            self._mbridge_sync = None


class MBridgeSynchronizer(WeightSynchronizer):
    """A `WeightSynchronizer` for `policy_generation.weight_synchronizer`. The policy workers must have `RefitMixin`.

    Args:
        policy: NeMo-RL's `Policy`; its `worker_group` runs the workers.
        engines: a picklable function that makes the engines' clients (`sync.trainer.engines.Engine`) in the first policy
            worker.
        options: fields of `sync.weight_sync.SyncOptions`.
        collect: the function that waits for the workers' results; `None` means `ray.get`.
    """

    def __init__(
        self,
        policy: Any,
        engines: Callable[[], Sequence[Any]],
        options: dict[str, Any] | None = None,
        collect: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        if collect is None:
            import ray

            collect = ray.get
        self._policy, self._engines, self._options, self._collect = policy, engines, options or {}, collect
        self._version = 0
        self._stale = True

    def init_communicator(self) -> None:
        """Connects the workers to the engines and makes the plan. Call it once, after policy and engines are up."""
        self._run("mbridge_connect", engines=self._engines, options=self._options)

    def sync_weights(self, *, timer: Any = None, kv_scales: dict[str, float] | None = None) -> dict[str, float]:
        """Syncs the weights in one transaction, and returns the metrics of rank 0. The engines pause by themselves for its
        commit.

        Raises:
            NotOffered: `kv_scales` of an fp8 KV cache are given.
            SyncError: (a RuntimeError) the sync failed; the message says which weights the engines serve now.
        """
        refuse("sync_weights", {"kv_scales": kv_scales})
        self._stale = True
        with contextlib.nullcontext() if timer is None else timer.time("prepare_for_generation/transfer_and_update_weights"):
            metrics = self._run("mbridge_sync", version=self._version + 1)
        self._version, self._stale = self._version + 1, False
        return {f"weight_sync/{name}": value for name, value in metrics[0].items()}

    @property
    def is_stale(self) -> bool:
        """Whether the last sync failed, or there was none yet."""
        return self._stale

    def shutdown(self) -> None:
        self._run("mbridge_close")

    def _run(self, method: str, **arguments: Any) -> list[Any]:
        return self._collect(self._policy.worker_group.run_all_workers_single_data(method, **arguments))
