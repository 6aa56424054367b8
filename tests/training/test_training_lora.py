"""LoRA on Megatron linears: equal on every layout, exact when off, and merged as it acts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import deepseek_models
import pytest
import torch
from ranks import RankError, run_ranks
from safetensors.torch import load_file
from tiny import DENSE as SIZES
from tiny import tiny_model
from tolerance import assert_near, assert_near_in_norm, backward, forward, near, rounding
from torch import nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import EngineMismatch, StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.megatron.lora.attach import (
    ATTENTION_TARGETS,
    LoRAConfig,
    adapted_modules,
    adapters_disabled,
    adapters_merged,
    add_lora,
    merge_adapters,
    unmerge_adapters,
)
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.adapter_sync import AdapterSync
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

DENSE, FEW_KV_HEADS, MOE, MLA = "qwen2", "few-kv-heads", "qwen3-moe", "deepseek"
# qwen2: linear_qkv has a bias, which Transformer Engine returns beside the output
ADAPTERS = LoRAConfig(rank=3, alpha=6.0)
ATTENTION = LoRAConfig(rank=3, alpha=6.0, targets=ATTENTION_TARGETS)
CANONICAL = LoRAConfig(rank=3, alpha=6.0, canonical=True)
SOME_PARTS = LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "up_proj"), canonical=True, rslora=True)
LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
MLA_FUSED = LoRAConfig(rank=3, alpha=6.0, targets=(*LATENT, "linear_fc1", "linear_fc2"))
DORA = LoRAConfig(rank=3, alpha=6.0, dora=True)
DORA_PARTS = replace(SOME_PARTS, dora=True)
# column-parallel linears alone: of the others' inputs every rank drops elements of its own
DROPPING = LoRAConfig(rank=3, alpha=6.0, targets=("linear_qkv", "linear_fc1"), dropout=0.3)
RANKS = replace(ADAPTERS, rank_pattern={"linear_fc2": 5, r".*\.[02]\.self_attn\..*": 2}, alpha_pattern={"o_proj": 1.5})
OUTPUT = LoRAConfig(rank=3, alpha=6.0, targets=("linear_qkv", "output_layer"))
PISSA = LoRAConfig(rank=3, alpha=6.0, start="pissa")
MLA_CANONICAL = LoRAConfig(rank=3, alpha=6.0, targets=MLA_FUSED.targets, canonical=True)
SP: dict[str, Any] = {"sequence_parallel": True}
RECOMPUTE = {"overrides": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}}


LAYERS, WIDTH = deepseek_models.TINY["num_hidden_layers"], SIZES["intermediate_size"]  # of the deepest of these models
FORWARD, BACKWARD, STEPS = forward(LAYERS, WIDTH), backward(LAYERS, WIDTH), 4


@cache
def _checkpoint(variant: str, scratch: Path) -> Path:
    if variant == MLA:
        deepseek_models.checkpoint(scratch / variant, "v3")
    elif variant == FEW_KV_HEADS:
        tiny_model("qwen3", num_key_value_heads=1).save_pretrained(scratch / variant)
    else:
        tiny_model(variant).save_pretrained(scratch / variant)
    return scratch / variant


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 515, (4, 12), generator=generator)
    return Batch.from_completions(tokens[:, :5].tolist(), tokens[:, 5:].tolist(), pad_token_id=0)


def _adapted(checkpoint: Path, layout: Layout, build: dict[str, Any], config: LoRAConfig) -> list[nn.Module]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout, **build)
    bridge.load_weights(model)
    add_lora(model, config)
    return model


def _train(rank: int, checkpoint: Path, layout: Layout, build: dict[str, Any], config: LoRAConfig) -> dict[str, Any]:
    bridge = AutoBridge.from_pretrained(checkpoint)
    model, batch = _adapted(checkpoint, layout, build, config), _batch()
    base_names = {name for name, p in unwrap(model)[0].named_parameters() if not p.requires_grad}
    # An epsilon far above the rounding of gradients, so that what is learned depends on them smoothly.
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-2, epsilon=1e-3, micro_batch_size=2))
    with adapters_disabled(trainer.model):
        base = trainer.compute_log_probs(batch).log_probs
    at_first = trainer.compute_log_probs(batch).log_probs
    frozen = {name: p.detach().clone() for name, p in unwrap(model)[0].named_parameters() if name in base_names}
    reports = [trainer.step(batch, supervised_loss) for _ in range(STEPS)]
    adapted = trainer.compute_log_probs(batch).log_probs
    merged = dict(bridge.export_weights(trainer.model))
    with adapters_merged(trainer.model):
        in_place = trainer.compute_log_probs(batch).log_probs
        exported = dict(bridge.export_weights(trainer.model))
    plain = bridge.build_model(layout, **build)
    bridge.load_weights(plain, merged)
    merged_log_probs = MegatronTrainer(plain, TrainerConfig(micro_batch_size=2)).compute_log_probs(batch).log_probs
    return {
        "loss": [report.loss for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
        # PiSSA: W x + B A x - B A x, each of the size of W x and rounded
        "starts_as_base": torch.equal(at_first, base) or (config.keeps_start and near(at_first, base, FORWARD)),
        "base_stays": all(torch.equal(dict(unwrap(model)[0].named_parameters())[name], p) for name, p in frozen.items()),
        # an output layer with adapters is Megatron's own, others are computed in chunks
        "merges": near(in_place, merged_log_probs, FORWARD if config == OUTPUT else 0.0)
        and all(torch.equal(exported[name], merged[name]) for name in merged),
        "reference_is_base": torch.equal(trainer.reference_log_probs(batch), base),
        "adapted": adapted,
        "merged": merged_log_probs,
        "base": base,
    }


@cache
def _alone(variant: str, scratch: Path, config: LoRAConfig) -> dict[str, Any]:
    return run_ranks(_train, 1, _checkpoint(variant, scratch), Layout(), {}, config)[0]


def _nightly(*case: Any) -> Any:
    """A case whose parts other cases have as well."""
    return pytest.param(*case, marks=pytest.mark.nightly)


CASES: list[Any] = [
    (DENSE, Layout(), RECOMPUTE, ADAPTERS),
    _nightly(DENSE, Layout(tp=2), {}, ADAPTERS),
    _nightly(DENSE, Layout(tp=2), SP, ADAPTERS),
    (DENSE, Layout(tp=2), SP | RECOMPUTE, ADAPTERS),
    _nightly(DENSE, Layout(pp=2), {}, ADAPTERS),
    (DENSE, Layout(cp=2), {}, ADAPTERS),
    (DENSE, Layout(tp=2, dp=2), SP, ADAPTERS),
    _nightly(DENSE, Layout(tp=2), SP, CANONICAL),
    (DENSE, Layout(tp=2), {}, SOME_PARTS),
    (DENSE, Layout(pp=2, vpp=2), {}, CANONICAL),
    (FEW_KV_HEADS, Layout(tp=2), SP, CANONICAL),
    (MOE, Layout(tp=2, ep=2, etp=1), SP, ADAPTERS),
    _nightly(MOE, Layout(tp=2), SP, CANONICAL),
    (MOE, Layout(ep=2, dp=2), {"grouped_experts": False}, ADAPTERS),
    _nightly(MLA, Layout(tp=2), SP, MLA_CANONICAL),
    (MLA, Layout(tp=2, ep=2, etp=1), SP, MLA_FUSED),
    _nightly(DENSE, Layout(tp=2), SP | RECOMPUTE, DORA),
    (DENSE, Layout(pp=2, tp=2), {}, DORA_PARTS),
    (DENSE, Layout(tp=2), {}, DROPPING),
    (MOE, Layout(tp=2), SP, DORA),
    (DENSE, Layout(tp=2), SP, PISSA),
    (DENSE, Layout(pp=2, tp=2), SP, RANKS),
    _nightly(DENSE, Layout(tp=2), SP, OUTPUT),
    (DENSE, Layout(tp=2, pp=2), {}, OUTPUT),
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout", "build", "config"), CASES, ids=str)
def test_adapters_train_as_in_one_process(
    variant: str, layout: Layout, build: dict[str, Any], config: LoRAConfig, scratch: Path
) -> None:
    alone = _alone(variant, scratch, config)
    for result in run_ranks(_train, layout.world_size, _checkpoint(variant, scratch), layout, build, config):
        assert result["starts_as_base"]
        assert result["base_stays"]  # bit for bit, also after merging and unmerging
        assert result["merges"]
        assert result["reference_is_base"]
        # The gradient norm counts every adapter exactly once. Each step sees the errors of those before it.
        assert_near(result["loss"], alone["loss"], STEPS * FORWARD, what="losses")
        assert_near(result["grad_norm"], alone["grad_norm"], STEPS * BACKWARD, what="norms")
        assert (result["adapted"] - result["base"]).abs().max() > 0.1
        # W x + B A x against (W + B A) x
        assert_near(result["merged"], result["adapted"], FORWARD, what="log-probabilities")


PACK = {"packing": True, "micro_batch_tokens": 20}
PACKED: list[tuple[str, Layout, dict[str, Any], LoRAConfig]] = [
    (DENSE, Layout(tp=2), SP, ADAPTERS),
    (DENSE, Layout(cp=2), {}, ADAPTERS),
    (DENSE, Layout(tp=2, cp=2), SP, DORA_PARTS),
    (MOE, Layout(tp=2, ep=2, etp=1), SP, ADAPTERS),
]


def _ragged() -> Batch:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 515, (count,), generator=generator).tolist()

    prompts, completions = [tokens(count) for count in (3, 5, 1, 4, 2)], [tokens(count) for count in (9, 2, 6, 1, 11)]
    return Batch.from_completions(prompts, completions, pad_token_id=0)


def _train_ragged(
    rank: int, checkpoint: Path, layout: Layout, build: dict[str, Any], config: LoRAConfig, split: dict[str, Any]
) -> tuple[list[float], list[float], torch.Tensor, dict[str, torch.Tensor]]:
    bridge, batch = AutoBridge.from_pretrained(checkpoint), _ragged()
    model = _adapted(checkpoint, layout, build, config)
    # An epsilon far above the rounding of gradients: the same adapters, not only the same losses.
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-2, epsilon=1e-2, **split))
    reports = [trainer.step(batch, supervised_loss) for _ in range(STEPS)]
    adapted = torch.where(batch.mask, trainer.compute_log_probs(batch).log_probs, 0.0)
    adapters = {name: tensor.clone() for name, tensor in bridge.export_adapter_weights(trainer.model)}
    return [report.loss for report in reports], [report.grad_norm for report in reports], adapted, adapters


@cache
def _padded_alone(
    variant: str, scratch: Path, config: LoRAConfig
) -> tuple[list[float], list[float], torch.Tensor, dict[str, torch.Tensor]]:
    split = {"micro_batch_size": 2}
    return run_ranks(_train_ragged, 1, _checkpoint(variant, scratch), Layout(), {}, config, split)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout", "build", "config"), PACKED, ids=str)
def test_packed_sequences_train_adapters_as_padded_rows_in_one_process(
    variant: str, layout: Layout, build: dict[str, Any], config: LoRAConfig, scratch: Path
) -> None:
    loss, norm, adapted, adapters = _padded_alone(variant, scratch, config)
    for result in run_ranks(_train_ragged, layout.world_size, _checkpoint(variant, scratch), layout, build, config, PACK):
        assert_near(result[0], loss, STEPS * FORWARD, what="losses")
        assert_near(result[1], norm, STEPS * BACKWARD, what="norms")
        assert_near(result[2], adapted, STEPS * FORWARD, what="log-probabilities")
        for name, adapter in adapters.items():
            assert_near_in_norm(result[3][name], adapter, STEPS * BACKWARD + rounding(STEPS), what=name)
    assert loss[0] - loss[-1] > 0.01  # the adapters were trained


def _initial(rank: int, checkpoint: Path, layout: Layout) -> dict[str, torch.Tensor]:
    model = _adapted(checkpoint, layout, {}, ADAPTERS)
    offset = unwrap(model)[0].decoder.layers[0].layer_number - 1
    renamed = {}
    for name, module in adapted_modules(model):
        _, _, local, rest = name.split(".", 3)
        renamed[f"{int(local) + offset}.{rest}"] = module.lora_a.detach().clone()
        assert not module.lora_b.any()
        assert module.adapter_parameter_names == ("lora_a", "lora_b")
        assert torch.equal(module.merged_weight(), module.weight)
    return renamed


def test_adapters_start_equal_on_every_layout(scratch: Path) -> None:
    checkpoint = _checkpoint(DENSE, scratch)
    alone = run_ranks(_initial, 1, checkpoint, Layout())[0]
    assert len(alone) == 4 * 4
    assert len({tensor.flatten()[0].item() for tensor in alone.values()}) == len(alone)  # each its own draw
    first, second = run_ranks(_initial, 2, checkpoint, Layout(tp=2))
    for name, full_tensor in alone.items():
        row_parallel = name.endswith(("linear_proj", "linear_fc2"))
        assert torch.equal(torch.cat([first[name], second[name]], 1) if row_parallel else first[name], full_tensor)
    stages = run_ranks(_initial, 2, checkpoint, Layout(pp=2))
    assert all(torch.equal((stages[0] | stages[1])[name], full_tensor) for name, full_tensor in alone.items())


def _merge_twice(rank: int, checkpoint: Path) -> None:
    model = _adapted(checkpoint, Layout(), {}, DORA)
    bridge, trainer = AutoBridge.from_pretrained(checkpoint), MegatronTrainer(model, TrainerConfig())
    with pytest.raises(ValueError, match="no merged adapters"):
        unmerge_adapters(trainer.model)
    with pytest.raises(StateMismatchError, match="DoRA's magnitudes were made from the weights that this model has"):
        bridge.load_weights(trainer.model)
    with pytest.raises(EngineMismatch, match=r"vLLM has no DoRA: .*sync merged weights"):
        AdapterSync(bridge, trainer.model, None)
    merge_adapters(trainer.model)
    with pytest.raises(ValueError, match="no adapters that are not merged"):
        merge_adapters(trainer.model)
    for use in (lambda: trainer.step(_batch(), supervised_loss), lambda: trainer.reference_log_probs(_batch())):
        with pytest.raises(RuntimeError, match="merged into its weights: call unmerge_adapters"):
            use()


def test_merged_adapters_neither_train_nor_have_a_reference(scratch: Path) -> None:
    run_ranks(_merge_twice, 1, _checkpoint(DENSE, scratch))


HIDDEN = SIZES["hidden_size"]
# fp32 decompositions of [32, 64]: as many reflections as columns, each of which sums over a column. Singular vectors are known
# as well as the gap to the next one is wide, which is a twentieth of the largest singular value and more here.
DECOMPOSED = 20 * rounding(HIDDEN, HIDDEN)


def _start(rank: int, checkpoint: Path, layout: Layout, config: LoRAConfig) -> tuple[dict[str, torch.Tensor], float, float]:
    """The adapters, how much the log-probabilities change with them, and the largest of these."""
    model = _adapted(checkpoint, layout, {}, config)
    trainer, bridge = MegatronTrainer(model, TrainerConfig(micro_batch_size=4)), AutoBridge.from_pretrained(checkpoint)
    with adapters_disabled(trainer.model):
        base = trainer.compute_log_probs(_batch()).log_probs
    difference = (trainer.compute_log_probs(_batch()).log_probs - base).abs().max().item()
    return dict(bridge.export_adapter_weights(trainer.model)), difference, base.abs().max().item()


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "olora", "pissa"])
def test_starts_leave_the_output_and_are_equal_on_every_layout(start: Any, scratch: Path) -> None:
    config, checkpoint = LoRAConfig(rank=4, alpha=6.0, canonical=True, start=start), _checkpoint(DENSE, scratch)
    [(alone, difference, scale)] = run_ranks(_start, 1, checkpoint, Layout(), config)
    ranks = run_ranks(_start, 2, checkpoint, Layout(tp=2), config)
    assert_near([difference, *(other for _, other, _ in ranks)], [0.0] * 3, FORWARD, scale=scale, what="log-probabilities")
    prefix = "base_model.model.model.layers.2.self_attn.v_proj"
    for (adapters, *_), name in itertools.product(ranks, (name for name in alone if name.endswith("lora_A.weight"))):
        if start in ("gaussian", "orthogonal"):
            assert torch.equal(adapters[name], alone[name])
            assert torch.equal(adapters[name.replace("A", "B")], alone[name.replace("A", "B")])
        else:  # signs of components depend on the order of rows, their product does not; decompositions are in fp32
            b_name = name.replace("lora_A", "lora_B")
            product, expected = (side[b_name][:, :4] @ side[name][:4] for side in (adapters, alone))
            assert_near(product, expected, DECOMPOSED, what=name)
    factor_a, factor_b = (alone[f"{prefix}.lora_{which}.weight"] for which in "AB")
    match start:
        case "gaussian":
            assert factor_a.std() == pytest.approx(1 / 4, rel=0.2)
            assert not factor_b.any()
        case "orthogonal":
            assert factor_b.any()
            # The rows are orthogonal to each other, so their products are sums of terms that cancel.
            size = (factor_b.norm() * factor_a.norm()).item()
            assert_near(factor_b @ factor_a, torch.zeros(len(factor_b), factor_a.shape[1]), rounding(HIDDEN), scale=size)
        case _:
            weight = load_file(checkpoint / "model.safetensors")[f"{prefix.removeprefix('base_model.model.')}.weight"]
            left, values, right = torch.linalg.svd(weight)
            best = (left[:, :4] * values[:4]) @ right[:4]
            if start == "pissa":
                assert_near(config.scale * factor_b[:, :4] @ factor_a[:4], best, DECOMPOSED)
            assert torch.equal(factor_a[4:], factor_a[:4])
            assert torch.equal(factor_b[:, 4:], -factor_b[:, :4])


def _refuse(rank: int, checkpoint: Path, config: LoRAConfig, twice: bool = False) -> None:
    initialize_parallel(Layout())
    model = AutoBridge.from_pretrained(checkpoint).build_model(Layout())
    try:
        add_lora(model, config)
    except (NotImplementedError, ValueError, UnsupportedModelError):
        assert all(parameter.requires_grad for parameter in model[0].parameters())  # nothing was changed
        raise
    if twice:
        add_lora(model, config)


def test_refusals_name_the_layer_and_what_is_supported(scratch: Path) -> None:
    dense, moe = _checkpoint(DENSE, scratch), _checkpoint(MOE, scratch)
    with pytest.raises(RankError, match=r"NotImplementedError: LoRA on decoder\.layers\.0\.mlp\.router \(TopKRouter\)"):
        run_ranks(_refuse, 1, moe, LoRAConfig(targets=("router",)))
    with pytest.raises(RankError, match=r"NotImplementedError: DoRA on output_layer is not supported: the rows that pad"):
        run_ranks(_refuse, 1, dense, LoRAConfig(targets=("output_layer",), dora=True))
    with pytest.raises(RankError, match=r"start=olora on output_layer is not supported: .*use plain LoRA"):
        run_ranks(_refuse, 1, dense, LoRAConfig(targets=("lm_head",), start="olora"))
    with pytest.raises(RankError, match=r"no layer of this model has a linear named in_proj; choose from linear_fc1.*q_proj"):
        run_ranks(_refuse, 1, dense, LoRAConfig(targets=("in_proj",)))
    with pytest.raises(RankError, match="rank must be at least 1"):
        run_ranks(_refuse, 1, dense, LoRAConfig(rank=0))
    with pytest.raises(RankError, match=r"dropout is a probability below 1, found 1\.0"):
        run_ranks(_refuse, 1, dense, LoRAConfig(dropout=1.0))
    with pytest.raises(RankError, match="orthogonal adapters have an even rank, found 3"):
        run_ranks(_refuse, 1, dense, LoRAConfig(rank=3, start="orthogonal"))
    with pytest.raises(RankError, match=r"layers\.0\..* has fewer than 65 components for pissa: lower the rank"):
        run_ranks(_refuse, 1, dense, LoRAConfig(rank=65, start="pissa"))
    with pytest.raises(RankError, match="has no experts"):
        run_ranks(_refuse, 1, dense, LoRAConfig(stacked_experts=True))
    with pytest.raises(RankError, match=r"UnsupportedModelError: .*PEFT has neither DoRA nor dropout for it"):
        run_ranks(_refuse, 1, moe, LoRAConfig(targets=("*.experts.*",), stacked_experts=True, dora=True))
    with pytest.raises(RankError, match="has an adapter already"):
        run_ranks(_refuse, 1, dense, ADAPTERS, True)
