"""What `test_requests_in_flight.py` runs beside a real vLLM engine, in an interpreter of its own (see `interpreter.py`)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from standin import light_model
from tiny import hf_state, tiny_checkpoint

from mbridge_rl.core.errors import TransferTimeout
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.payload.engine_side import kept_bytes
from mbridge_rl.sync.payload.messages import Introduction
from mbridge_rl.sync.vllm.engines.in_process import Completion, InProcessEngine
from mbridge_rl.sync.weight_sync import WeightSync

SIZES = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
PROMPT = [5, 9, 33, 100, 514]
LENGTH = 120


def commits_amid_requests(directory: Path) -> dict[str, Any]:
    """Syncs from version 0 (A) to 1 (B) and on, with a request in flight each time, under each policy for requests."""
    tiny_checkpoint(directory / "A", "qwen3", seed=0, **SIZES)
    tiny_checkpoint(directory / "B", "qwen3", seed=1, **SIZES)
    engine = InProcessEngine(directory / "A", max_model_len=256, max_num_seqs=4)
    ends = {tag: light_model("qwen3", ParallelLayout(), 0, hf_state(directory / tag), SIZES) for tag in "AB"}
    results: dict[str, Any] = {}
    version = 0
    for requests in ("keep", "wait", "abort"):
        for mode in ("staged", "streaming"):
            bridge, model = ends["B"]
            sync = WeightSync(bridge, model, engine, mode=mode, requests=requests, bucket_bytes=1 << 16)
            version += 1
            before = engine.weight_version
            completion, report = _generate_while(engine, lambda s=sync, v=version: s.sync(v))
            results[requests, mode] = (before, version, completion, report.engine["seconds"]["pause"])
            if requests == "keep":
                switch = completion.token_versions.index(version)
                (rest,) = _greedy(engine, PROMPT + completion.tokens[:switch], LENGTH - switch)
                results[requests, mode, "as if prompted"] = rest.tokens == completion.tokens[switch:]
            sync.close()
            version += 1
            back = WeightSync(*ends["A"], engine)
            back.sync(version)
            back.close()
    engine._requests._open.add("a request that never ends")
    late = WeightSync(*ends["B"], engine, requests="wait", timeout=0.3)
    try:
        late.sync(version + 1)
    except TransferTimeout as error:
        results["late"] = str(error)
    engine._requests._open.clear()
    results["serves on"] = engine.weight_version == version and len(_greedy(engine, PROMPT, 4)) == 1
    return results


def _greedy(engine: InProcessEngine, prompt: list[int], length: int) -> list[Completion]:
    return engine.generate([prompt], temperature=0.0, max_tokens=length, ignore_eos=True)


def _generate_while(engine: InProcessEngine, sync: Any) -> tuple[Completion, Any]:
    """One request; the sync begins after its tenth step."""
    llm_engine = engine.llm.llm_engine
    started, step, steps = threading.Event(), llm_engine.step, 0

    def counted() -> Any:
        nonlocal steps
        steps += 1
        if steps == 10:
            started.set()
        return step()

    llm_engine.step = counted
    answers: list[Completion] = []
    thread = threading.Thread(target=lambda: answers.extend(_greedy(engine, PROMPT, LENGTH)))
    thread.start()
    assert started.wait(60)
    report = sync()
    thread.join(60)
    assert not thread.is_alive()
    del llm_engine.step
    return answers[0], report


def a_pipeline_of_two(directory: Path) -> dict[str, Any]:
    """An engine of two pipeline stages gets version 1 (B) between requests and version 2 (A) amid one."""
    tiny_checkpoint(directory / "A", "qwen3", seed=0, **SIZES)
    tiny_checkpoint(directory / "B", "qwen3", seed=1, **SIZES)
    ends = {tag: light_model("qwen3", ParallelLayout(), 0, hf_state(directory / tag), SIZES) for tag in "AB"}
    engine = InProcessEngine(directory / "A", max_model_len=256, max_num_seqs=4, pipeline_parallel_size=2)
    sync = WeightSync(*ends["B"], engine, bucket_bytes=1 << 16)
    workers = Introduction.from_json(sync.store.description(sync.route.fingerprint)).workers
    results: dict[str, Any] = {
        "before": _greedy(engine, PROMPT, 8),
        "report": sync.sync(1),
        "after": _greedy(engine, PROMPT, 8),
    }
    results["tensor_names"] = [set(worker["landings"]) for worker in workers]
    results["kept_bytes"] = [kept_bytes(worker) for worker in workers]
    sync.close()
    sync = WeightSync(*ends["A"], engine, mode="streaming", bucket_bytes=1 << 16)
    completion, _ = _generate_while(engine, lambda: sync.sync(2))
    switch = completion.token_versions.index(2)
    (rest,) = _greedy(engine, PROMPT + completion.tokens[:switch], LENGTH - switch)
    results |= {"amid": completion, "as if prompted": rest.tokens == completion.tokens[switch:]}
    sync.close()
    engine.close()
    with InProcessEngine(directory / "B", max_model_len=256, max_num_seqs=4) as fresh:
        results["fresh"] = _greedy(fresh, PROMPT, 8)
        (old,) = _greedy(fresh, PROMPT, switch)
        results["old tokens"] = old.tokens == completion.tokens[:switch]
    return results
