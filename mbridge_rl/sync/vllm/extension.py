"""The two settings of vLLM with which a trainer can reach the workers of an engine that somebody else started."""

from __future__ import annotations

from typing import Any

from mbridge_rl.sync.vllm.lora import adapter_slots
from mbridge_rl.sync.vllm.worker import calls as worker_calls

EXTENSION = "mbridge_rl.sync.vllm.extension.WorkerExtension"
METHOD = "mbridge_rl_call"
_CALLS = {
    call.__name__: call
    for call in (
        worker_calls.initialize,
        worker_calls.describe,
        worker_calls.adopt,
        worker_calls.receive_shards,
        worker_calls.status,
        worker_calls.commit_shards,
        worker_calls.abandon,
        worker_calls.unusable,
        worker_calls.identity,
        worker_calls.lose,
        worker_calls.publish,
        worker_calls.catch_up,
        adapter_slots.in_slots,
        adapter_slots.served_adapters,
    )
}


class WorkerExtension:
    """A class that vLLM mixes into its worker (`worker_extension_cls`)."""

    def mbridge_rl_call(self, call: str, *args: Any) -> list[Any]:
        """Runs one of the calls of this module by its name; arguments and the answer are plain JSON types."""
        return list(worker_calls.answering(self, _CALLS[call], *args))


def engine_args() -> dict[str, Any]:
    """Keyword arguments for `AsyncEngineArgs`, next to the user's own, that let a trainer connect to the engine.

    Raises:
        ImportError: vLLM is not installed.
    """
    from vllm.config import WeightTransferConfig

    return {
        "weight_transfer_config": WeightTransferConfig(backend="mbridge"),
        "worker_extension_cls": EXTENSION,
        "logprobs_mode": "processed_logprobs",  # the log-probabilities of the distribution that tokens are sampled from
    }
