"""Adapters from Megatron ranks into the LoRA slots of a live vLLM engine: proven, in place, and apart from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreter import Interpreter
from ranks import run_ranks
from tiny import DENSE, logit_scale, tiny_checkpoint
from tolerance import assert_near, forward

pytest.importorskip("vllm")

import adapter_scenarios

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.megatron.lora.attach import LoRAConfig, adapted_modules, add_lora
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.adapter_sync import AdaptedEngine, AdapterSync
from mbridge_rl.sync.trainer.engines import Engines
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PROMPTS = [[5, 9, 33, 100, 514], [1, 2, 3]]
SIZES = {"hidden_size": 256, "head_dim": 32}  # heads of 32: the smallest that vLLM computes on a CPU
ENGINE = {"max_model_len": 64, "max_num_seqs": 8, "enable_lora": True, "max_loras": 4, "max_lora_rank": 8}

# W x + B A x in vLLM against (W + B A) x in Transformers, whose deltas are several times the weights.
ROUNDING = forward(DENSE["num_hidden_layers"], SIZES["hidden_size"])
LOGITS = logit_scale(SIZES["hidden_size"])

Answers = list[tuple[list[int], list[float]]]


def greedy(engine: EngineProcess, adapter: Any, prompts: list[list[int]] = PROMPTS) -> Answers:
    answers = engine.generate(prompts, temperature=0.0, max_tokens=4, adapter=adapter)
    return [(answer.tokens, answer.logprobs) for answer in answers]


def greedy_of_transformers(start: Path, state: dict[str, torch.Tensor]) -> Answers:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    model.load_state_dict(state, strict=False)
    answers: Answers = []
    for prompt in PROMPTS:
        tokens, logprobs = list(prompt), []
        for _ in range(4):
            with torch.no_grad():
                step = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(step.argmax()))
            logprobs.append(float(step.max()))
        answers.append((tokens[len(prompt) :], logprobs))
    return answers


def assert_close(found: Answers, expected: Answers) -> None:
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert_near(logprobs, wanted_logprobs, ROUNDING, scale=LOGITS, what="log-probabilities")


def assert_equal(found: Answers, expected: Answers) -> None:
    assert found == expected


def fill(model: list[torch.nn.Module], seed: int) -> None:
    """Random factors; what ranks hold alike stays alike, and each row of `B` is its own through its sign."""
    rank = torch.distributed.get_rank()
    for index, (_, module) in enumerate(adapted_modules(model)):
        for name in module.adapter_parameter_names:
            factor = getattr(module, name)
            sharded = factor.tensor_model_parallel
            generator = torch.Generator().manual_seed(1000 * seed + 10 * index + (rank + 1 if sharded else 0))
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.15)


class TearsABit:
    """An engine behind a wire that flips a bit of the adapter."""

    def __init__(self, engine: EngineProcess, sync: AdapterSync) -> None:
        self._engine, self._sync = engine, sync

    def put_adapter(self, update: dict[str, Any]) -> Any:
        self._sync._arena.view(update["offsets"][3], (1,), torch.uint8).bitwise_xor_(1)
        return self._engine.put_adapter(update)


def trained_policy_is_sampled(bridge: AutoBridge, model: list[torch.nn.Module], engine: EngineProcess | None) -> float:
    """Two real steps, a sync, and samples: how far the trainer's log-probabilities of them are from the engine's."""
    fill(model, 1)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-2))
    batch = Batch.from_completions(PROMPTS, [[7, 8, 9], [10, 11]], pad_token_id=0)
    for _ in range(2):
        trainer.step(batch, supervised_loss)
    near = AdapterSync(bridge, trainer.model, engine, "d")
    expected = near.sync(1)
    near.close()
    # As if every rank and the engine were on a machine of its own: what travels is the same.
    with patch("mbridge_rl.sync.adapter_sync.machine_id", str), patch.object(RankGroup, "on_one_machine", False):
        far = AdapterSync(bridge, trainer.model, engine, "d")
    found = far.sync(2)
    assert (found.digest, found.nbytes, found.verified) == (expected.digest, expected.nbytes, True)
    far.close()
    sampled = [torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)]
    if engine is not None:
        answers = AdaptedEngine(engine, "d").generate(PROMPTS, max_tokens=4, seed=3, ignore_eos=True)
        assert {answer.weight_version for answer in answers} == {2}
        sampled = [torch.tensor([answer.tokens for answer in answers]), torch.tensor([answer.logprobs for answer in answers])]
    for tensor in sampled:
        torch.distributed.broadcast(tensor, 0)
    tokens, engine_log_probs = sampled
    batch = Batch.from_completions(PROMPTS, tokens.tolist(), pad_token_id=0)
    log_probs = trainer.compute_log_probs(batch).log_probs[batch.mask]
    return (log_probs - engine_log_probs.flatten()).abs().max().item()


def three_adapters_in_turn(
    rank: int, start: Path, layout: ParallelLayout, config: LoRAConfig, start_engine: Callable[[], Any], updates: int
) -> dict[str, Any]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(start)
    model = bridge.build_model()
    bridge.load_weights(model)
    add_lora(model, config)
    engine = start_engine() if rank == 0 else None
    assert_alike = assert_equal if isinstance(engine, EngineProcess) else assert_close  # others batch requests as they come
    base = greedy(engine, None) if engine else None
    syncs = {name: AdapterSync(bridge, model, engine, name) for name in "abc"}
    found: dict[str, Any] = {"reports": [], "checks": 0}
    for version, name in enumerate("abcacb"[:updates], start=1):
        others = [other for other in "abc" if engine and other != name and other in engine.adapter_versions()]
        before = {other: (engine.adapter_digests(other), greedy(engine, other)) for other in others} if engine else {}
        fill(model, seed=version)
        report = syncs[name].sync(version)
        merged = dict(bridge.export_weights(model))
        found["reports"].append(report)
        if engine is None:
            continue
        assert_close(greedy(engine, name), greedy_of_transformers(start, merged))
        assert greedy(engine, name) != base
        for other, (digests, answers) in before.items():
            assert engine.adapter_digests(other) == digests
            assert_alike(greedy(engine, other), answers)
            found["checks"] += 1
        assert engine.adapter_versions()[name] == version
        (answer, *_) = engine.generate(PROMPTS[:1], max_tokens=1, adapter=name)
        assert answer.adapter == f"{name}@{version}"
    if engine is not None:
        mixed = greedy(engine, ["a", None, "c", "b", None], [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
        a, b, c = (greedy(engine, name) for name in "abc")
        assert_close(mixed, [a[0], base[0], c[1], b[0], base[1]])
        found["versions"] = engine.adapter_versions()

    # A bit that flips on the way: the version before serves on.
    served = (engine.adapter_digests("a"), greedy(engine, "a")) if engine else None
    if engine is not None:
        syncs["a"]._engines = Engines([TearsABit(engine, syncs["a"])])  # type: ignore[list-item]
    fill(model, 9)
    with pytest.raises(DigestMismatch, match=r"1 of \d+ factors arrived with other bytes"):
        syncs["a"].sync(20)
    if engine is not None:
        assert engine.adapter_digests("a") == served[0]
        assert_alike(greedy(engine, "a"), served[1])
        assert engine.adapter_versions() == found["versions"]
        syncs["a"]._engines = Engines([engine])
    with pytest.raises(EngineMismatch, match="has 4 LoRA slots, one of them for base rows, and holds a, b, c"):
        AdapterSync(bridge, model, engine, "d").sync(1)
    if engine is not None:
        engine.remove_adapter("c")
        with pytest.raises(SyncError, match="holds no adapter 'c'; found a, b"):
            greedy(engine, "c")
    AdapterSync(bridge, model, engine, "d").sync(1)
    if engine is not None:
        assert_close(greedy(engine, None), base)
    found["policies_differ"] = trained_policy_is_sampled(bridge, model, engine)
    if engine is not None:
        engine.close()
    for sync in syncs.values():
        sync.close()
    found["model_bytes"] = sum(tensor.nbytes for tensor in bridge.metadata(torch.float32))
    return found


@pytest.mark.parametrize(
    ("variant", "layout", "config", "engine_options", "updates"),
    [
        pytest.param("qwen3", ParallelLayout(tp=2), LoRAConfig(rank=4, alpha=10.0), {}, 6, id="qwen3-tp2"),
        pytest.param(
            "qwen2",
            ParallelLayout(tp=2),
            LoRAConfig(
                rank=3,
                alpha=5.0,
                targets=("q_proj", "v_proj", "linear_proj", "linear_fc2"),
                canonical=True,
                rslora=True,
                rank_pattern={"linear_proj": 5, r".*layers\.1\.self_attn\..*": 2},
                alpha_pattern={"down_proj": 9.0},
            ),
            {"tensor_parallel_size": 2},
            4,
            id="qwen2-tp2-some-parts-engine-tp2",
        ),
    ],
)
def test_three_adapters_updated_in_turn_do_not_disturb_each_other(
    variant: str,
    layout: ParallelLayout,
    config: LoRAConfig,
    engine_options: dict[str, Any],
    updates: int,
    tmp_path: Path,
) -> None:
    start, _ = tiny_checkpoint(tmp_path / "start", variant, seed=0, **SIZES)
    adapt_in_turn(layout, start, config, lambda: EngineProcess(start, **ENGINE, **engine_options).start(), updates)


def adapt_in_turn(
    layout: ParallelLayout, start: Path, config: LoRAConfig, start_engine: Callable[[], Any], updates: int, timeout: float = 240
) -> None:
    first, *others = run_ranks(
        three_adapters_in_turn, layout.world_size, start, layout, config, start_engine, updates, timeout=timeout
    )
    assert first["checks"] == {6: 9, 4: 5}[updates]
    assert_near(first["policies_differ"], 0.0, ROUNDING, scale=LOGITS, what="the policy's log-probabilities")
    assert first["versions"] == {name: "abcacb"[:updates].rindex(name) + 1 for name in "abc"}
    for report in first["reports"]:
        assert (report.adapter in "abc", report.transport) == (True, "shared_memory")
        assert report.engine["digest"] == report.digest
        assert report.engine["proven"] == report.tensors
        assert report.engine["bytes"] == report.nbytes
        assert report.nbytes < 0.2 * first["model_bytes"]  # tiny models: rank 4 of width 256
    assert len({report.digest for report in first["reports"]}) == updates
    for other in others:
        assert [report.digest for report in other["reports"]] == [report.digest for report in first["reports"]]


def test_slots_are_proven_and_whatever_fails_is_undone(tmp_path: Path) -> None:
    dense, _ = tiny_checkpoint(tmp_path / "dense", "qwen3", seed=0, **SIZES)
    experts, _ = tiny_checkpoint(tmp_path / "experts", "qwen3-moe", seed=0, **SIZES)
    interpreter = Interpreter()
    try:
        interpreter.call(adapter_scenarios.slots_are_proven_and_reverted, dense)
        difference = interpreter.call(adapter_scenarios.ranks_by_pattern_act_as_merged_weights, dense)
        assert_near(difference, 0.0, ROUNDING, scale=LOGITS, what="log-probabilities")
        interpreter.call(adapter_scenarios.tokens_are_labelled_with_the_policys_versions, dense)
        interpreter.call(adapter_scenarios.adapters_by_names_and_json, dense)
        interpreter.call(adapter_scenarios.an_engine_without_lora_says_so, dense)
        interpreter.call(adapter_scenarios.experts_beside_adapters_are_refused, experts)
    finally:
        interpreter.close()
