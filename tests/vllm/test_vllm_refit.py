"""Refit of live vLLM engines: exact, proven, transactional. Everything is real; models are tiny, random and in fp32."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import engine_life_scenarios
import pytest
import torch
from tolerance import assert_near, forward

pytest.importorskip("vllm")

import attached_scenarios
import refit_engines
import refit_scenarios as scenarios
from interpreter import Interpreter

from mbridge_rl.core.errors import EngineProcessError
from mbridge_rl.sync.vllm.engines.process import EngineProcess

ROUNDING = forward(layers=3, width=192)  # of the largest of these models


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    refit_engines.make_checkpoints(directory)
    return directory


@pytest.fixture(scope="module")
def engines(checkpoints: Path) -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="module")
def process(checkpoints: Path) -> Iterator[EngineProcess]:
    with EngineProcess(checkpoints / "qwen3_moe" / "A", max_model_len=64, max_num_seqs=8) as engine:
        yield engine


def transformers_logprobs(directory: Path, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """`[len(tokens), vocab]` log-probabilities of Transformers at each generated position."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(torch.tensor([prompt + tokens]), use_cache=False).logits[0].float()
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, -1)


@pytest.mark.slow
@pytest.mark.parametrize("family", refit_engines.FAMILIES)
def test_refit_equals_a_fresh_engine_and_transformers(engines: Interpreter, checkpoints: Path, family: str) -> None:
    completions = engines.call(scenarios.refit_equals_fresh_engine, checkpoints, family)
    for prompt, completion in zip(refit_engines.PROMPTS, completions, strict=True):
        expected = transformers_logprobs(checkpoints / family / "B", prompt, completion.tokens)
        assert expected.argmax(-1).tolist() == completion.tokens
        size = expected.abs().max().item()
        assert_near(completion.logprobs, expected.max(-1).values, ROUNDING, scale=size, what="log-probabilities")


@pytest.mark.parametrize("family", refit_engines.FAMILIES)
def test_buckets_that_split_fused_tensors_are_exact(engines: Interpreter, checkpoints: Path, family: str) -> None:
    engines.call(scenarios.buckets_that_split_tensors_are_exact, checkpoints, family)


@pytest.mark.parametrize("family", refit_engines.FAMILIES)
def test_a_trace_covers_every_parameter_and_changes_none(engines: Interpreter, checkpoints: Path, family: str) -> None:
    engines.call(scenarios.trace_covers_everything_and_changes_nothing, checkpoints, family)


def test_a_flipped_bit_before_the_first_write_keeps_the_old_version(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.flipped_bit_before_the_first_write, checkpoints)


def test_a_flipped_bit_after_a_write_stops_the_engine(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.flipped_bit_after_a_write, checkpoints)


@pytest.mark.parametrize(
    ("family", "parameter_name", "hf_name"),
    [
        ("qwen3", "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("qwen2_tied", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("qwen3_moe", "model.layers.2.mlp.experts.routed_experts.w2_weight", "model.layers.2.mlp.experts.0.down_proj.weight"),
    ],
)
def test_a_bit_that_flips_in_the_engine_is_found_at_commit(
    engines: Interpreter, checkpoints: Path, family: str, parameter_name: str, hf_name: str
) -> None:
    engines.call(scenarios.corrupted_live_weights, checkpoints, family, parameter_name, hf_name)


def test_an_engine_of_another_config_is_refused(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.other_config_is_refused, checkpoints)


def test_metadata_that_does_not_fit_the_engine_is_refused(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.unfitting_metadata_is_refused, checkpoints)


def test_updates_out_of_order_are_refused(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.misuse_of_an_update, checkpoints)


def test_a_version_whose_trainer_failed_is_lost_and_the_next_sync_heals(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.trainers_that_fail_amid_an_update, checkpoints)


def test_a_commit_drops_the_prefix_cache(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.prefix_cache_is_dropped, checkpoints)


def test_the_accelerators_layerwise_way_is_exact(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.layerwise_reload_is_exact, checkpoints)


def test_a_failed_step_leaves_no_requests_behind(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(engine_life_scenarios.a_failed_step_leaves_no_requests, checkpoints)


def test_process_groups_outlive_an_engine(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(engine_life_scenarios.process_groups_outlive_an_engine, checkpoints)


def test_the_trainers_end_imports_no_vllm() -> None:
    engines = "mbridge_rl.sync.vllm.engines"
    program = f"import sys, {engines}.in_process, {engines}.process; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_engines_without_the_backend_are_left_alone(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(engine_life_scenarios.other_engines_are_left_alone, checkpoints)


def test_an_engine_is_reached_by_names_and_json_alone(engines: Interpreter, tmp_path: Path) -> None:
    """As an `AsyncLLM` and a server are (`test_attached_engines.py`)."""
    engines.call(attached_scenarios.by_names_and_json, tmp_path)


@pytest.mark.slow
def test_unmodified_vllm_finds_the_backend(checkpoints: Path) -> None:
    interpreter = Interpreter()
    try:
        interpreter.call(engine_life_scenarios.unmodified_vllm_loads_the_backend, checkpoints)
    finally:
        interpreter.close()


def test_sampling_is_seeded_and_logprobs_are_of_the_sampled_distribution(engines: Interpreter, checkpoints: Path) -> None:
    first, again, other = engines.call(scenarios.sampling, checkpoints)
    assert first == again
    assert first != other
    assert [completion.prompt_index for completion in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({tuple(completion.tokens) for completion in first}) == 9  # samples and equal prompts differ
    completion = first[4]
    expected = transformers_logprobs(checkpoints / "qwen3" / "A", refit_engines.PROMPTS[1], completion.tokens, temperature=0.7)
    for position, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        assert_near(logprob, expected[position, token].item(), ROUNDING, scale=expected.abs().max().item())


def test_seeds_and_lengths_of_prompts_go_with_them(engines: Interpreter, checkpoints: Path) -> None:
    engines.call(scenarios.seeds_and_lengths_of_prompts_go_with_them, checkpoints)


def test_stop_tokens_end_a_completion(engines: Interpreter, checkpoints: Path) -> None:
    unstopped, stopped = engines.call(scenarios.stops, checkpoints)
    assert unstopped.finish_reason == "length"
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == unstopped.tokens[: unstopped.tokens.index(unstopped.tokens[2]) + 1]


@pytest.mark.slow
def test_a_slow_answer_is_an_error_and_does_not_confuse_the_next(process: EngineProcess) -> None:
    expected = refit_engines.greedy(process)
    process._call_timeout, call_timeout = 1e-6, process._call_timeout
    try:
        with pytest.raises(EngineProcessError, match="did not answer generate within 1e-06 s"):
            process.generate([[1, 2, 3]], temperature=0.0, max_tokens=30)
    finally:
        process._call_timeout = call_timeout
    # The request that nobody waits for may be in the same batch, whose sums round otherwise: only tokens are compared.
    answers = refit_engines.greedy(process)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


@pytest.mark.slow
def test_a_hung_engine_costs_one_time_out(process: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks after a time-out whether the engine lives waits no second one."""
    monkeypatch.setattr("mbridge_rl.sync.vllm.engines.process.PROOF_OF_LIFE", 0.1)
    monkeypatch.setattr(process, "_call_timeout", 2.0)
    os.kill(process._process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        for _ in range(3):
            with pytest.raises(EngineProcessError, match="did not answer"):
                assert process.weight_version
        assert 2.0 < time.monotonic() - started < 3.5
    finally:
        os.kill(process._process.pid, signal.SIGCONT)
    monkeypatch.setattr("mbridge_rl.sync.vllm.engines.process.PROOF_OF_LIFE", 60.0)
    assert process.weight_version >= 0  # it woke up, and has its time again


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "missing").start()
    with pytest.raises(Exception, match="missing"):
        engine.wait_ready(timeout=120)
    engine.close()


@pytest.mark.slow
def test_a_killed_engine_is_reported_at_once(checkpoints: Path) -> None:
    with EngineProcess(checkpoints / "qwen3" / "A", max_model_len=64) as engine:
        engine.wait_ready()
        assert engine._process is not None
        engine._process.kill()
        with pytest.raises(EngineProcessError, match=r"died|gone"):
            refit_engines.greedy(engine)


@pytest.mark.slow
def test_an_engine_ends_with_its_parent(checkpoints: Path) -> None:
    program = (
        "import sys, time\n"
        "from mbridge_rl.sync.vllm.engines.process import EngineProcess\n"
        "engine = EngineProcess(sys.argv[1], max_model_len=64).start()\n"
        "print(engine._process.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(checkpoints / "qwen3" / "A")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(5.0)  # amid its imports: past the start of its watch, before it could notice the end of its input
    assert Path(f"/proc/{child}").exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
