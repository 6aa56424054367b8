"""The function that vLLM calls in each of its processes (entry point group `vllm.general_plugins`)."""

from __future__ import annotations

from mbridge_rl.sync.vllm.worker import cpu_routing, cpu_weights


def register() -> None:
    """Registers the weight-transfer backend "mbridge" with vLLM; on a CPU it also keeps weights refittable and corrects the
    routing. Idempotent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if cpu_weights.BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            cpu_weights.BACKEND, "mbridge_rl.sync.vllm.worker.backend", "PlannedSyncEngine"
        )
    if current_platform.is_cpu():
        cpu_weights.install()
        cpu_routing.install()
