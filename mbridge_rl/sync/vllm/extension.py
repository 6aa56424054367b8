"""The two settings of vLLM with which a trainer can reach the workers of an engine that somebody else started."""

from __future__ import annotations

from typing import Any

from mbridge_rl.core.errors import MessageError
from mbridge_rl.core.typed_values import shown
from mbridge_rl.sync.payload.message_codec import decode, require_message
from mbridge_rl.sync.payload.messages import WorkerCall
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

    def mbridge_rl_call(self, call: object, *_: object) -> dict[str, Any]:
        """Runs one of the calls of this module. The call is an encoded `WorkerCall`, the result an encoded `Answer`. A trainer
        of version 0.1, which gives a name and arguments, is refused."""
        return worker_calls.answered(lambda: _run(self, call))


def _run(worker: Any, call: object) -> Any:
    worker_call = require_message(decode(call), WorkerCall, "the trainer")
    if worker_call.function not in _CALLS:
        raise MessageError(
            f"this engine's mbridge_rl knows no call {shown(worker_call.function)}, only {', '.join(_CALLS)}: install the same "
            "mbridge_rl on trainer and engines"
        )
    return _CALLS[worker_call.function](worker, *worker_call.arguments)


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
