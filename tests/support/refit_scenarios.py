"""What `test_vllm_refit.py` runs beside a real vLLM engine, in an interpreter of its own (see `interpreter.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from refit_engines import (
    PROMPTS,
    VOCABULARY,
    Trainer,
    assert_serves,
    config_of,
    digest_of,
    engine_of,
    failing_part,
    flipped_bit,
    fresh_completions,
    greedy,
    left_open,
    metadata_of,
    parameters_of,
    weights_of,
    without_versions,
)

from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, EngineUnusable, SyncError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.messages import Announcement
from mbridge_rl.sync.vllm.engines.in_process import Completion, InProcessEngine
from mbridge_rl.sync.vllm.worker.landing_map import LandingMap
from mbridge_rl.sync.vllm.worker.loading import _LayerwiseLoader


def refit_equals_fresh_engine(directory: Path, family: str) -> list[Completion]:
    """Also returns what was generated, for a comparison with Transformers."""
    engine = engine_of(directory, family)
    with Trainer(engine, directory, family) as trainer:
        for version, tag in enumerate("BAB", start=1):
            weights = weights_of(directory, family, tag)
            report = trainer.sync(weights, version)
            (of_engine,) = report.engines
            assert of_engine["proven_live"] == len(weights)
            assert of_engine["proven_received"] == 0
            assert report.digest == of_engine["digest"] == digest_of(weights)
            assert engine.weight_version == version
            completions = greedy(engine)
            assert {completion.weight_version for completion in completions} == {version}
            assert_serves(engine, directory, family, tag)
    assert without_versions(fresh_completions(directory, family, "A")) != without_versions(completions)
    return completions


def buckets_that_split_tensors_are_exact(directory: Path, family: str) -> None:
    """Buckets of odd sizes, which cut fused tensors, experts and rows, in both modes."""
    engine = engine_of(directory, family)
    modes: list[tuple[Literal["staged", "streaming"], int]] = [("staged", 4097), ("streaming", 33_333), ("streaming", 1 << 20)]
    version = 9
    for mode, bucket_bytes in modes:
        with Trainer(engine, directory, family, mode=mode, bucket_bytes=bucket_bytes) as trainer:
            for tag in "AB":
                version += 1
                assert trainer.sync(weights_of(directory, family, tag), version).version == version
                assert_serves(engine, directory, family, tag)


def trace_covers_everything_and_changes_nothing(directory: Path, family: str) -> None:
    engine = engine_of(directory, family)
    before, expected = parameters_of(engine), without_versions(greedy(engine))
    weights = weights_of(directory, family, "A")
    engine.describe(Announcement.of(metadata_of(weights), config_of(directory, family)))
    after = parameters_of(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert without_versions(greedy(engine)) == expected
    landings = engine.receiver._landings
    assert landings is not None
    assert not landings.untraceable
    assert {landing.parameter_name for parts in landings.landings.values() for landing in parts} == before.keys()


def flipped_bit_before_the_first_write(directory: Path) -> None:
    """Staged, a bit that flips on the way is found beside the old version, which goes on serving."""
    engine = engine_of(directory, "qwen3")
    with Trainer(engine, directory, "qwen3", retries=0) as trainer:
        trainer.sync(weights_of(directory, "qwen3", "A"), 20)
        before = parameters_of(engine)
        with flipped_bit(0), pytest.raises(DigestMismatch, match=r"1 tensors.*arrived"):
            trainer.sync(weights_of(directory, "qwen3", "B"), 21)
        after = parameters_of(engine)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert engine.weight_version == 20
        assert_serves(engine, directory, "qwen3", "A")


def flipped_bit_after_a_write(directory: Path) -> None:
    """Streaming, the engine refuses to generate, says what it lost, and recovers with the next good sync."""
    family = "qwen3_moe"
    engine, weights = engine_of(directory, family), weights_of(directory, family, "B")
    with Trainer(engine, directory, family, mode="streaming", bucket_bytes=1 << 16, retries=0) as trainer:
        trainer.sync(weights_of(directory, family, "A"), 30)
        with flipped_bit(trainer.parts // 2), pytest.raises(DigestMismatch, match=r"1 tensors of worker 0 are not in the live"):
            trainer.sync(weights, 31)
        for _ in range(2):
            with pytest.raises(EngineUnusable, match=r"version 31 was lost \(before it: version 30\)"):
                greedy(engine)
        with pytest.raises(EngineUnusable, match="version 31 was lost"):  # past our own check, at the model itself
            _generate_with_plain_vllm(engine)
        assert engine.weight_version == 30
        trainer.sync(weights, 32)
        assert_serves(engine, directory, family, "B")


def _generate_with_plain_vllm(engine: InProcessEngine) -> None:
    from vllm import SamplingParams

    try:
        engine.llm.generate([{"prompt_token_ids": PROMPTS[0]}], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
    finally:
        llm_engine = engine.llm.llm_engine
        llm_engine.abort_request(list(llm_engine.output_processor.request_states), internal=True)


def corrupted_live_weights(directory: Path, family: str, parameter_name: str, hf_name: str) -> None:
    """A single bit that flips inside of the engine, after the load, is found at commit: where a loader of the engine's own may
    have written after us, live weights are digested once more."""
    engine, weights = engine_of(directory, family), weights_of(directory, family, "B")
    receiver = engine.receiver

    def flip() -> None:
        receiver.model.get_parameter(parameter_name).data.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)

    with Trainer(engine, directory, family, retries=0) as trainer:
        receiver.payload._adopted = replace(receiver.payload._adopted, writes_are_final=False)
        receiver.settle = flip  # type: ignore[method-assign]
        with pytest.raises(DigestMismatch, match=rf"1 tensors of worker 0 are not.*{hf_name} \(in {parameter_name}\)"):
            trainer.sync(weights, 40)
        del receiver.settle
        with pytest.raises(EngineUnusable, match="version 40 was lost"):
            greedy(engine)
        trainer.sync(weights, 41)
        assert_serves(engine, directory, family, "B")


def other_config_is_refused(directory: Path) -> None:
    engine, weights = engine_of(directory, "qwen3"), weights_of(directory, "qwen3", "A")
    before, expected = parameters_of(engine), without_versions(greedy(engine))
    config = config_of(directory, "qwen3")
    wrong = config | {"num_hidden_layers": 4, "rope_theta": 5e5, "architecture": "Qwen2ForCausalLM"}
    with pytest.raises(EngineMismatch) as caught:
        engine.describe(Announcement.of(metadata_of(weights), wrong))
    for text in (
        "architecture: the trainer has 'Qwen2ForCausalLM', the engine 'Qwen3ForCausalLM'",
        "num_hidden_layers: the trainer has 4, the engine 3",
        "rope_theta: the trainer has 500000.0, the engine",
    ):
        assert text in str(caught.value)
    assert "hidden_size" not in str(caught.value)
    after = parameters_of(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert without_versions(greedy(engine)) == expected


def unfitting_metadata_is_refused(directory: Path) -> None:
    engine, good = engine_of(directory, "qwen3"), metadata_of(weights_of(directory, "qwen3", "A"))
    expected = without_versions(greedy(engine))
    by_name = {tensor.hf_name: tensor for tensor in good}
    k_proj = "model.layers.1.self_attn.k_proj.weight"
    cases = {
        "unknown.weight: the engine's loader refuses it": [*good, HFTensor("unknown.weight", torch.float32, (3,))],
        "model.layers.0.mlp.gate_proj.bias: the engine's loader ignores it": [
            *good,
            HFTensor("model.layers.0.mlp.gate_proj.bias", torch.float32, (160,)),
        ],
        f"{k_proj}[64:65, 0:192] (192 elements) is used by no parameter of the engine": [
            HFTensor(k_proj, torch.float32, (65, 192)) if tensor.hf_name == k_proj else tensor for tensor in good
        ],
        # q has 6 heads of 32 rows; k and v have 2 each
        r"model.layers.1.self_attn.qkv_proj.weight[192:256, 0:192] (12288 elements) of [320, 192] is filled by no tensor": [
            tensor for tensor in good if tensor.hf_name != k_proj
        ],
        "model.norm.weight[0:192] (192 elements)": [tensor for tensor in good if tensor.hf_name != "model.norm.weight"],
        "model.norm.weight: the trainer sends torch.float64, the engine holds torch.float32": [
            HFTensor(tensor.hf_name, torch.float64, tensor.shape) if tensor.hf_name == "model.norm.weight" else tensor
            for tensor in by_name.values()
        ],
        f"{k_proj}: the trainer sends torch.float8_e4m3fn, the engine holds torch.float32": [
            HFTensor(k_proj, torch.float8_e4m3fn, tensor.shape) if tensor.hf_name == k_proj else tensor for tensor in good
        ],
    }
    for message, metadata in cases.items():
        with pytest.raises(EngineMismatch) as caught:
            engine.describe(Announcement.of(metadata))
        assert message in str(caught.value)
        assert without_versions(greedy(engine)) == expected


def misuse_of_an_update(directory: Path) -> None:
    engine, weights = engine_of(directory, "qwen3"), weights_of(directory, "qwen3", "A")
    with Trainer(engine, directory, "qwen3", mode="streaming", retries=0) as trainer:
        trainer.sync(weights, 60)
        with pytest.raises(SyncError, match="has to come before commit"):
            engine.commit(61)
        with pytest.raises(SyncError, match=r"takes weights by planned syncs \(mbridge_rl.WeightSync\)"):
            engine.llm.start_weight_update()
        request = trainer.request(61)
        with pytest.raises(EngineMismatch, match="the sender's plan has fingerprint 'feed'"):
            engine.begin(replace(request, fingerprint="feed"))
        assert_serves(engine, directory, "qwen3", "A")  # nothing of the above wrote a weight
        engine.begin(request)
        with pytest.raises(EngineUnusable, match="an update from version 60 to version 61 is under way"):
            engine.require_usable()
        with pytest.raises(SyncError, match="version 62 cannot be committed: the open update is to version 61"):
            engine.commit(62)
        trainer.sync(weights, 63)
        assert_serves(engine, directory, "qwen3", "A")


def trainers_that_fail_amid_an_update(directory: Path) -> None:
    """Streaming: the version is lost, with its reason, and the next complete sync sets the engine going."""
    engine, weights = engine_of(directory, "qwen3"), weights_of(directory, "qwen3", "A")
    with Trainer(engine, directory, "qwen3", mode="streaming", bucket_bytes=1 << 16, retries=0) as trainer:
        trainer.sync(weights, 64)
        with failing_part(trainer.parts // 2), pytest.raises(SyncError, match="ValueError: boom"):
            trainer.sync(weights, 65)
        with pytest.raises(EngineUnusable, match=r"version 65 was lost.*boom"):
            greedy(engine)
        trainer.sync(weights, 66)
        assert_serves(engine, directory, "qwen3", "A")
        with left_open(engine), failing_part(trainer.parts // 2), pytest.raises(SyncError, match="ValueError: boom"):
            trainer.sync(weights, 67)
        with Trainer(engine, directory, "qwen3") as successor:  # of a trainer that died amid a sync
            with pytest.raises(EngineUnusable, match=r"version 67 was lost.*another trainer introduced itself"):
                greedy(engine)
            successor.sync(weights, 68)
            assert_serves(engine, directory, "qwen3", "A")


def prefix_cache_is_dropped(directory: Path) -> None:
    """A prompt of several blocks, cached under A, is computed anew under B."""
    prompt = [[(7 * index) % VOCABULARY for index in range(40)]]

    def answers(engine: InProcessEngine) -> list[tuple[list[int], list[float]]]:
        return without_versions(engine.generate(prompt, temperature=0.0, max_tokens=8, ignore_eos=True))

    options: dict[str, Any] = {"max_model_len": 64, "enable_prefix_caching": True, "block_size": 32}
    with InProcessEngine(directory / "qwen3" / "B", **options) as fresh:
        expected = answers(fresh)
    with InProcessEngine(directory / "qwen3" / "A", **options) as engine:
        first = answers(engine)
        assert answers(engine)[0][0] == first[0][0]  # from the cache
        with Trainer(engine, directory, "qwen3") as trainer:
            trainer.sync(weights_of(directory, "qwen3", "B"), 1)
        assert answers(engine) == expected
        assert first != expected


def layerwise_reload_is_exact(directory: Path) -> None:
    """The way that accelerators take, over vLLM's layerwise reload, on a CPU engine whose weights are plain: written directly,
    and as complete tensors through the engine's own loader."""
    engine = engine_of(directory, "qwen3")
    receiver, learn = engine.receiver, LandingMap.learn
    loader = receiver._loader
    receiver._loader = _LayerwiseLoader(receiver.model, receiver.vllm_config)

    def learn_without_trace(*args: Any) -> LandingMap:
        landing_map = learn(*args)
        landing_map.untraceable |= dict.fromkeys(landing_map.tensors, "a test wants it so")
        return landing_map

    version, total = 79, len(weights_of(directory, "qwen3", "A"))
    try:
        for learned, proven_live, mode in ((learn, total, "staged"), (learn_without_trace, 0, "staged"),
                                           (learn_without_trace, 0, "streaming")):  # fmt: skip
            with (
                patch.object(LandingMap, "learn", learned),
                Trainer(engine, directory, "qwen3", mode=mode, bucket_bytes=1 << 16, retries=0) as trainer,
            ):
                for tag in "BA":
                    version += 1
                    (of_engine,) = trainer.sync(weights_of(directory, "qwen3", tag), version).engines
                    assert (of_engine["proven_live"], of_engine["proven_received"]) == (proven_live, total - proven_live)
                    assert_serves(engine, directory, "qwen3", tag)
                if mode == "streaming":  # half of its layers without weights
                    with failing_part(trainer.parts // 2), pytest.raises(SyncError, match="ValueError: boom"):
                        trainer.sync(weights_of(directory, "qwen3", "B"), 90)
                    with pytest.raises(EngineUnusable, match="version 90 was lost"):
                        greedy(engine)
                    trainer.sync(weights_of(directory, "qwen3", "B"), 91)
                    assert_serves(engine, directory, "qwen3", "B")
    finally:
        receiver._loader = loader


def sampling(directory: Path) -> list[list[Completion]]:
    """Completions at temperature 0.7, twice with one seed and once with another."""
    engine = engine_of(directory, "qwen3")
    with Trainer(engine, directory, "qwen3") as trainer:
        trainer.sync(weights_of(directory, "qwen3", "A"), 70)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    return [engine.generate(prompts, n=3, temperature=0.7, max_tokens=6, seed=seed) for seed in (1, 1, 2)]


def seeds_and_lengths_of_prompts_go_with_them(directory: Path) -> None:
    """A prompt's seed and longest completion are its own: in another order the same prompts get the same completions."""
    engine = engine_of(directory, "qwen3")
    order = [2, 0, 1]
    first = engine.generate(PROMPTS, temperature=0.7, max_tokens=[3, 5, 7], seed=[11, 12, 13], ignore_eos=True)
    again = engine.generate(
        [PROMPTS[index] for index in order], temperature=0.7, max_tokens=[7, 3, 5], seed=[13, 11, 12], ignore_eos=True
    )
    assert [len(completion.tokens) for completion in first] == [3, 5, 7]
    assert [completion.tokens for completion in again] == [first[index].tokens for index in order]


def stops(directory: Path) -> tuple[Completion, Completion]:
    """Returns a greedy completion, and the completion of the same prompt with the third token of the first as stop token."""
    engine = engine_of(directory, "qwen3")
    (unstopped,) = engine.generate(PROMPTS[:1], temperature=0.0, max_tokens=6, ignore_eos=True)
    (stopped,) = engine.generate(PROMPTS[:1], temperature=0.0, max_tokens=6, stop_token_ids=[unstopped.tokens[2]])
    return unstopped, stopped
