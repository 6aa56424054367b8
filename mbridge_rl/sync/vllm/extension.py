"""The two settings of vLLM with which a trainer can reach the workers of an engine that somebody else started."""

from __future__ import annotations

from functools import partial
from typing import Any

from mbridge_rl.core.errors import MessageError
from mbridge_rl.core.typed_values import shown
from mbridge_rl.sync.vllm.lora import adapter_slots
from mbridge_rl.sync.vllm.worker import calls as worker_calls

EXTENSION = "mbridge_rl.sync.vllm.extension.WorkerExtension"
METHOD = "mbridge_rl_call"
_CALLS = {
    call.__name__: call
    for call in (
        worker_calls.describe,
        worker_calls.adopt,
        worker_calls.begin,
        worker_calls.status,
        worker_calls.commit,
        worker_calls.abort,
        worker_calls.publish,
        worker_calls.lose,
        worker_calls.identity,
        adapter_slots.in_slots,
        adapter_slots.served_adapters,
    )
}


class WorkerExtension:
    """A class that vLLM mixes into its worker (`worker_extension_cls`)."""

    def mbridge_rl_call(self, call: str, *args: Any) -> dict[str, Any]:
        """Runs one of the calls of this module by its name; arguments and the answer are encoded messages."""
        return worker_calls.answering(self, _CALLS.get(call, partial(_unknown, call)), *args)


def _unknown(call: str, *_: object) -> None:
    raise MessageError(
        f"this engine's mbridge_rl knows no call {shown(call)}, only {', '.join(_CALLS)}: install the same mbridge_rl on "
        "trainer and engines"
    )


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
