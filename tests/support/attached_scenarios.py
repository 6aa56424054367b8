"""What `test_attached_engines.py` runs on engines that it started itself: an `AsyncLLM`, a `vllm serve`, an actor."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standin import light_model
from tiny import hf_state, logit_scale, tiny_checkpoint
from tolerance import assert_near, forward

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import EngineUnusable, SyncError, TransferTimeout
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.transports.shared_memory import RingOutlet, SlotOutlet
from mbridge_rl.sync.vllm.engines.attached import AttachedEngine
from mbridge_rl.sync.vllm.engines.completions import sampling
from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
from mbridge_rl.sync.vllm.engines.server import ServerEngine
from mbridge_rl.sync.vllm.extension import EXTENSION
from mbridge_rl.sync.vllm.lora.adaptable_engine import AdapterSlots
from mbridge_rl.sync.vllm.worker import calls as worker_calls
from mbridge_rl.sync.weight_sync import WeightSync

SIZES = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
LIMITS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
PROMPT = [5, 9, 33, 100, 514]
LENGTH = 200
DELAYS = (0.2, 0.3, 0.1, 0.5, 0.8, 1.3, 2.0)  # until a request is under way, seconds: machines and their load differ
# The same kernels in another process, in batches of other sizes.
ROUNDING = forward(SIZES["num_hidden_layers"], SIZES["hidden_size"])


def make_checkpoints(directory: Path) -> None:
    for seed, tag in enumerate("AB"):
        tiny_checkpoint(directory / tag, "qwen3", seed=seed, **SIZES)


def trainer_of(directory: Path, tag: str, engine: Any, **options: Any) -> WeightSync:
    bridge, model = light_model("qwen3", ParallelLayout(), 0, hf_state(directory / tag), SIZES)
    return WeightSync(bridge, model, engine, **{"bucket_bytes": 1 << 16, "timeout": 30.0, **options})


def greedy(engine: Any, length: int = 8) -> Any:
    return engine.generate([PROMPT], temperature=0.0, max_tokens=length, ignore_eos=True)[0]


def fresh(directory: Path, tag: str) -> Any:
    with InProcessEngine(directory / tag, **LIMITS, kv_cache_bytes=1 << 26) as engine:
        return greedy(engine)


def is_refitted_exactly(engine: Any, directory: Path, url: str) -> None:
    """Syncs both checkpoints in turn, by every transport that fits a host, and samples several completions with seeds."""
    wanted = {tag: fresh(directory, tag) for tag in "AB"}
    assert_same(greedy(engine), wanted["A"])
    ways = [("staged", "auto"), ("staged", "files"), ("streaming", "shared_memory"), ("streaming", "process_group")]
    for version, (mode, transport) in enumerate(ways, start=1):
        tag = "BA"[version % 2 == 0]
        sync = trainer_of(directory, tag, engine, mode=mode, transport=transport, url=url)
        report = sync.sync(version)
        sync.close()
        assert report.digest == report.engine["digest"]
        assert report.engine["proven_live"] == report.tensors
        assert engine.weight_version == version
        completion = greedy(engine)
        assert_same(completion, wanted[tag])
        assert set(completion.token_versions) == {version}
    several = engine.generate([PROMPT, PROMPT, [7]], n=2, temperature=1.0, seed=3, max_tokens=[4, 5, 6])
    assert [(one.prompt_index, len(one.tokens), len(one.logprobs)) for one in several] == [
        (index, 4 + index, 4 + index) for index in (0, 0, 1, 1, 2, 2)
    ]
    assert several[0].tokens != several[1].tokens
    again = engine.generate([PROMPT, PROMPT, [7]], n=2, temperature=1.0, seed=3, max_tokens=[4, 5, 6])
    assert [one.tokens for one in again] == [one.tokens for one in several]


def holds_requests_in_flight(engine: Any, directory: Path) -> None:
    """Requests in flight are continued, waited for or aborted, as the versions of their tokens show."""
    before, after, continued = amid_a_request(engine, directory, "keep", lambda answer: len(set(answer.token_versions)) == 2)
    assert (continued.finish_reason, len(continued.tokens)) == ("length", LENGTH)
    assert list(continued.token_versions) == sorted(continued.token_versions)
    assert set(continued.token_versions) == {before, after}
    before, _, waited = amid_a_request(
        engine, directory, "wait", lambda answer: answer.token_versions[0] != engine.weight_version
    )
    assert (len(waited.tokens), set(waited.token_versions)) == (LENGTH, {before})
    before, _, aborted = amid_a_request(
        engine, directory, "abort", lambda answer: answer.tokens and len(answer.tokens) < LENGTH
    )
    assert (aborted.finish_reason, set(aborted.token_versions)) == ("abort", {before})


def amid_a_request(engine: Any, directory: Path, requests: str, was_amid: Any) -> tuple[int, int, Any]:
    """The versions before and after a sync, and the answer to a request; the sync begins at other times until it is amid it."""
    for delay in DELAYS:
        before, version = engine.weight_version, engine.weight_version + 1
        sync = trainer_of(directory, "BA"[version % 2], engine, requests=requests)
        answers: list[Any] = []
        asking = threading.Thread(target=lambda to=answers: to.append(greedy(engine, LENGTH)))
        asking.start()
        time.sleep(delay)
        sync.sync(version)
        asking.join(60)
        sync.close()
        if was_amid(answers[0]):
            return before, version, answers[0]
    raise AssertionError(f"no sync of requests={requests!r} began amid a request, or it was not held")


def outlives_a_lost_version(engine: Any, directory: Path) -> None:
    """An update that fails half-way: nothing is generated, nothing dies, and requests wait until the next sync mends it."""
    waited = False
    for delay in DELAYS:
        lost = engine.weight_version + 1
        sync = trainer_of(directory, "B", engine, mode="streaming", retries=0, timeout=5.0)
        answers: list[Any] = []
        asking = threading.Thread(target=lambda to=answers: to.append(answer_or_error(engine)))
        asking.start()
        time.sleep(delay)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RingOutlet, "finish", stalls)
            with pytest.raises(SyncError, match="the trainer stalls"):
                sync.sync(lost)
        with pytest.raises(EngineUnusable, match=f"version {lost} was lost"):
            greedy(engine)
        waited = not answers
        sync.sync(lost + 1)
        asking.join(60)
        assert greedy(engine).weight_version == lost + 1
        sync.close()
        if waited:
            assert answers[0].token_versions[-1] == lost + 1
            return
    raise AssertionError("no version was lost amid a request, or the request did not wait")


def answer_or_error(engine: Any) -> Any:
    try:
        return greedy(engine, LENGTH)
    except EngineUnusable as error:
        return error


def stalls(outlet: RingOutlet) -> None:
    raise TransferTimeout("the trainer stalls")


def assert_same(completion: Any, wanted: Any) -> None:
    assert completion.tokens == wanted.tokens
    # The log-probabilities of the likeliest tokens are small, but the logits that they are computed from are not.
    assert_near(completion.logprobs, wanted.logprobs, ROUNDING, scale=logit_scale(SIZES["hidden_size"]))


class ByName(AttachedEngine):
    """An engine in this process, reached as from outside: by names of methods, and JSON."""

    def __init__(self, engine: InProcessEngine) -> None:
        self._engine, self.halted = engine, False
        self._attach(0)

    def _sizes(self) -> tuple[int, int]:
        return 1, 1

    def _rpc(self, method: str, args: list[Any]) -> list[Any]:
        return json.loads(json.dumps(self._engine.llm.collective_rpc(method, args=tuple(json.loads(json.dumps(args))))))

    def _halt(self, requests: str, timeout: float) -> None:
        self.halted = True

    def _go_on(self) -> None:
        self.halted = False

    def _label(self) -> str:
        return self._engine.llm.get_weight_version()

    def _set_label(self, label: str) -> None:
        self._engine.llm.update_weight_version(label)

    def _reset_caches(self) -> bool:
        return self._engine.llm.reset_prefix_cache(reset_running_requests=True)

    def _completions(self, prompts: list[list[int]], fields: list[dict[str, Any]], asked_of: list[Any]) -> list[Any]:
        adapters = [adapter and adapter.name for adapter in asked_of]
        return self._engine.generate(prompts, temperature=0.0, max_tokens=8, ignore_eos=True, adapter=adapters)


def by_names_and_json(directory: Path) -> None:
    make_checkpoints(directory)
    with InProcessEngine(directory / "A", **LIMITS, kv_cache_bytes=1 << 26, worker_extension_cls=EXTENSION) as inner:
        engine = ByName(inner)
        sync = trainer_of(directory, "B", engine)
        report = sync.sync(1)
        assert report.digest == report.engine["digest"]
        assert greedy(engine).token_versions == (1,) * 8
        sync.close()
        sync = trainer_of(directory, "A", engine, mode="streaming", retries=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RingOutlet, "finish", stalls)
            with pytest.raises(SyncError, match="the trainer stalls"):
                sync.sync(2)
        assert engine.halted  # vLLM's engine core would die of another step
        with pytest.raises(EngineUnusable, match=r"version 2 was lost \(before it: version 1\)"):
            greedy(engine)
        sync.sync(3)
        assert not engine.halted
        assert_same(greedy(engine), fresh(directory, "A"))
        sync.close()


def async_llm(model_dir: Path, **options: Any) -> Any:
    """Must be called on the event loop that it is to live in."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from mbridge_rl.sync.vllm.extension import engine_args

    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "dtype": "float32"}
    return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model_dir), **settings | options, **engine_args()))


def started_async_engine(model_dir: Path, **options: Any) -> Any:
    """With an event loop in a thread; `close` ends the engine, too."""
    from mbridge_rl.sync.vllm.engines.async_engine import AsyncEngine

    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start() -> Any:
        return async_llm(model_dir, **options)

    llm = asyncio.run_coroutine_threadsafe(start(), loop).result(300)
    engine = AsyncEngine(llm, loop)
    engine.close = llm.shutdown  # type: ignore[method-assign]
    return engine


def refit_from_megatron(rank: int, directory: Path, start_engine: Callable[[], Any], wanted: Any) -> None:
    """Real Megatron ranks refit an engine that starts with the weights of "A". A fresh engine with "B"'s answers `wanted`."""
    initialize_parallel(ParallelLayout(tp=2))
    bridge = AutoBridge.from_pretrained(directory / "A")
    model = bridge.build_model()
    engine = start_engine() if rank == 0 else None
    answers = {"B": wanted, "A": greedy(engine) if engine else None}
    ways = [("staged", "shared_memory"), ("streaming", "process_group"), ("streaming", "shared_memory")]
    for version, (mode, transport) in enumerate(ways, start=1):
        tag = "AB"[version % 2]
        bridge.load_weights(model, directory / tag)
        sync = WeightSync(bridge, model, engine, mode=mode, transport=transport, bucket_bytes=1 << 16, timeout=60.0)
        report = sync.sync(version)
        sync.close()
        if engine is not None:
            assert len(report.engine["bytes_per_worker"]) == 2
            assert report.digest == report.engine["digest"]
            assert report.engine["proven_live"] == report.tensors
            completion = greedy(engine)
            assert_same(completion, answers[tag])
            assert set(completion.token_versions) == {version}
    if engine is not None:
        engine.close()


async def of_async_llm(directory: Path) -> None:
    from mbridge_rl.sync.vllm.engines.async_engine import AsyncEngine

    llm = async_llm(directory / "A", **LIMITS)
    engine = await AsyncEngine.connect(llm)
    assert await asyncio.to_thread(lambda: engine.weight_version) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mbridge_rl.sync.vllm.engines.async_engine._LOOP_SECONDS", 0.2)
        with pytest.raises(SyncError, match="A sync must not run on it"):
            greedy(engine)
    await asyncio.to_thread(is_refitted_exactly, engine, directory, str(directory / "files"))
    await asyncio.to_thread(holds_requests_in_flight, engine, directory)
    await asyncio.to_thread(outlives_a_lost_version, engine, directory)
    llm.shutdown()


def an_async_llm(directory: Path) -> None:
    make_checkpoints(directory)
    asyncio.run(of_async_llm(directory))


def a_server(directory: Path, url: str) -> None:
    engine = ServerEngine(url)
    is_refitted_exactly(engine, directory, str(directory / "files"))
    holds_requests_in_flight(engine, directory)
    outlives_a_lost_version(engine, directory)
    engine.close()


def trainers_are_killed(directory: Path, url: str) -> None:
    """Trainers die amid a transfer and in the pause of a commit. Requests that wait then are answered after the next sync."""
    engine = ServerEngine(url)
    wanted = {"A": greedy(engine)}
    update(directory, "B", engine, 1)
    wanted["B"] = greedy(engine)

    is_killed(directory, url, "staged", SlotOutlet, "send")  # the trainer that is killed had the weights of "A"
    completion = greedy(engine)
    assert_same(completion, wanted["B"])
    assert set(completion.token_versions) == {1}

    is_killed(directory, url, "streaming", RingOutlet, "send")
    with pytest.raises(EngineUnusable, match="an update from version 1 to version 9 is under way"):
        greedy(engine)
    goes_on_with_the_next(engine, directory, "A", 2, wanted["A"])
    is_killed(directory, url, "staged", ServerEngine, "_in_workers")  # in the commit: it is decided, and the engine is paused
    goes_on_with_the_next(engine, directory, "B", 3, wanted["B"])
    is_killed(directory, url, "staged", ServerEngine, "_serve")  # the weights are "A"'s, their version is still 3
    goes_on_with_the_next(engine, directory, "B", 4, wanted["B"])
    is_killed(directory, url, "streaming", ServerEngine, "_serve")
    goes_on_with_the_next(engine, directory, "A", 5, wanted["A"])
    engine.close()


def update(directory: Path, tag: str, engine: Any, version: int) -> None:
    sync = trainer_of(directory, tag, engine)
    sync.sync(version)
    sync.close()


def is_killed(directory: Path, url: str, mode: str, kind: type, method: str) -> None:
    """Another trainer, with the weights of "A", that dies when it comes to `method` (for a commit, where there are several)."""
    pid = os.fork()
    if pid == 0:
        try:
            called = getattr(kind, method)

            def dies(self: Any, *args: Any) -> Any:
                if method == "_in_workers" and args[0] is not worker_calls.commit:
                    return called(self, *args)
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(kind, method, dies)
            trainer_of(directory, "A", ServerEngine(url), mode=mode).sync(9)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def goes_on_with_the_next(engine: Any, directory: Path, tag: str, version: int, wanted: Any) -> None:
    answers: list[Any] = []
    fields = sampling(1, temperature=0.0, max_tokens=8, ignore_eos=True)
    asking = threading.Thread(target=lambda: answers.extend(engine._completions([PROMPT], fields, [None])))
    asking.start()
    asking.join(3.0)
    assert not answers  # the engine is paused
    update(directory, tag, engine, version)
    asking.join(60.0)
    for completion in (*answers, greedy(engine)):
        assert_same(completion, wanted)
        assert set(completion.token_versions) == {version}
    assert len(answers) == 1


def names_adapters_for_everybody(url: str, start: Path) -> None:
    """Another client finds the adapters that `adapt_in_turn` left in the engine, and its requests can name them."""
    from adapter_scenarios import adapter, put

    engine = ServerEngine(url)
    assert engine.adapter_versions().keys() == {"a", "b", "d"}

    def tokens_of(name: str | None) -> list[int]:
        body = {"token_ids": PROMPT, "sampling_params": {"temperature": 0.0, "max_tokens": 4}, "model": name}
        return engine._post("/inference/v1/generate", body)["choices"][0]["token_ids"]

    for name in ("a", "b", "d"):
        assert tokens_of(name) == engine.generate([PROMPT], temperature=0.0, max_tokens=4, adapter=name)[0].tokens
    assert tokens_of("a") != tokens_of("b")
    with pytest.raises(SyncError, match="the engine holds no adapter 'c'; found a, b, d"):
        engine.generate([PROMPT], adapter="c")
    with pytest.raises(SyncError, match="The model `c` does not exist"):
        tokens_of("c")

    engine.remove_adapter("d")
    before, tensors = [tokens_of(name) for name in ("a", "b", None)], adapter(start, 7)
    pid = os.fork()
    if pid == 0:  # a trainer that dies when vLLM knows the adapter, but its slot has no factors yet
        AdapterSlots._replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        put(ServerEngine(url), "e", 1, tensors)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert engine.adapter_versions().keys() == {"a", "b"}
    put(engine, "e", 2, tensors)
    assert engine.adapter_versions()["e"] == 2
    assert [tokens_of(name) for name in ("a", "b", None)] == before
    assert tokens_of("e") not in before
    engine.close()
