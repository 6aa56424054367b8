"""A vLLM engine for rollouts that takes weights from a trainer, in this process. `process.py` runs it in a child process."""

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
from mbridge_rl.sync.payload.messages import CommitReport, UpdateRequest
from mbridge_rl.sync.vllm.engines.completions import Completion, completion_of, sampling
from mbridge_rl.sync.vllm.engines.requests import RequestRunner
from mbridge_rl.sync.vllm.engines.transactions import TransactionalEngine
from mbridge_rl.sync.vllm.plugin import register
from mbridge_rl.sync.vllm.versions import keep_when_collected, require_vllm
from mbridge_rl.sync.vllm.worker import calls as worker_calls
from mbridge_rl.sync.worker.update_watch import UpdateWatch

if TYPE_CHECKING:
    from mbridge_rl.sync.vllm.worker.receiver import Receiver

# Variables that vLLM reads while an engine is built. They are set for that time, and only if the user has not set them.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process and starts in a quarter of the time
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_CI_ENV": "1",  # no compilation, no warm-up
    "HF_HUB_OFFLINE": "1",
}
_SEVERAL_WORKERS_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # binding fails if there are fewer cores than workers


class InProcessEngine(TransactionalEngine):
    """A vLLM `LLM` whose weights a trainer replaces, version by version.

    It has the methods that `sync.weight_sync.WeightSync` calls on an engine. Several threads may call it: their requests share
    the engine's steps, and an update comes between two steps.

    Args:
        model_dir: a Hugging Face checkpoint; its weights are version `weight_version`.
        dtype: the dtype of weights and activations: "float32", "bfloat16", ...
        seed: the seed of vLLM.
        max_model_len: longest prompt plus completion, in tokens.
        max_num_seqs: number of completions that are generated at the same time.
        tensor_parallel_size: workers that share each layer.
        pipeline_parallel_size: pipeline stages; if there is more than one worker in total, each is a process of its own.
        kv_cache_bytes: memory for the KV cache, per worker.
        weight_version: the version of the checkpoint's weights.
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
                "trust_remote_code": False,  # engine_args can allow the code of a checkpoint
                "enforce_eager": True,
                "max_num_batched_tokens": max(max_model_len, 2048),
                # If a prompt is cut, vLLM rewinds the generator of a seeded request, which CPU generators cannot do.
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
        keep_when_collected(client)  # `close` does what is left of vLLM's own shutdown
        self._core = client.engine_core
        self._requests = RequestRunner(self.llm.llm_engine)
        self._watch: UpdateWatch | None = None
        self.llm.update_weight_version(str(weight_version))
        if self._workers > 1:
            self._unlink_shared_memory()
            worker_calls.in_workers(self.llm, worker_calls.make_stage_buffers)

    @property
    def weight_version(self) -> int:
        """The version that is served now, or was served last."""
        return int(self.llm.get_weight_version())

    @property
    def receiver(self) -> Receiver:
        """The only worker's receiver.

        Raises:
            SyncError: there are several workers, in other processes.
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
            prompts: token ids.
            n: completions per prompt.
            temperature: sampling temperature; 0 is greedy.
            max_tokens: most tokens of every completion, or one number per prompt.
            seed: makes sampling reproducible whatever else is in the batch; each prompt and sample gets its own stream. One
                number per prompt makes a prompt's stream independent of its position in the batch.
            stop_token_ids: tokens that end a completion.
            logprobs: return the log-probability of each token.
            ignore_eos: go on after the end-of-sequence token.
            adapter: name of the adapter (`put_adapter`) that answers, or one per prompt; `None` is the base model.

        Raises:
            EngineUnusable: a sync failed half-way; the message names the version that was lost.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.require_usable()
        fields_by_prompt = sampling(
            len(prompts),
            n=n,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        adapters = self._adapters.for_prompts(adapter, len(prompts))
        outputs = self._requests.run(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY) for fields in fields_by_prompt],
            adapters and [served.request for served in adapters],
        )
        version = self.weight_version
        return [
            replace(completion_of(index, sample, version), adapter=adapters and adapters[index].label)
            for index, output in enumerate(outputs)
            for sample in sorted(output.outputs, key=lambda sample: sample.index)
        ]

    def reset_prefix_cache(self) -> None:
        """Drops cached keys and values, also of requests in flight, which compute them anew. A commit does this by itself."""
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise SyncError("the prefix cache could not be dropped")

    def begin(self, request: UpdateRequest) -> None:
        super().begin(request)
        if request.mode == "streaming":
            self._watch = UpdateWatch(self.status, self.abort, request.timeout)

    def commit(self, version: int, requests: InFlight = "keep", timeout: float = 600.0) -> CommitReport:
        self._end_watch()
        return super().commit(version, requests, timeout)

    def abort(self, reason: str) -> None:
        self._end_watch()
        super().abort(reason)

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
        """The shared-memory files through which this process and the workers communicate, which stay if all are killed."""
        by_worker = worker_calls.in_workers(self.llm, worker_calls.shared_memory_files)
        return sorted({path for paths in [worker_calls.shared_memory_files(None), *by_worker] for path in paths})

    def close(self) -> None:
        """Frees the engine. Idempotent."""
        if not hasattr(self, "llm"):
            return
        self._end_watch()
        self._core.model_executor.shutdown()
        self._core.scheduler.shutdown()
        del self.llm, self._core
        gc.unfreeze()  # vLLM froze the objects that existed when the engine started
        gc.collect()

    def __enter__(self) -> InProcessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unlink_shared_memory(self) -> None:
        """Unlinks the shared memory of the CPU workers' reductions, which vLLM never does. All workers have mapped it now."""
        for ident in worker_calls.in_workers(self.llm, worker_calls.shared_memory_ident):
            for path in Path("/dev/shm").glob(f"{ident}-*") if ident else ():
                path.unlink(missing_ok=True)


def import_vllm() -> tuple[Any, Any]:
    require_vllm("a rollout engine needs vLLM")
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    return LLM, WeightTransferConfig


def _drop_groups_without_experts() -> None:
    """Lets vLLM make its process-global groups anew if they come from a dense model, and so have none for experts.

    Otherwise no MoE engine could follow a dense one in this process. The groups have one rank, so the dense engine can use the
    new ones.
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
