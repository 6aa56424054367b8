"""LoRA on Megatron linears: equal on every layout, exact when off, and merged as it acts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_deepseek
import torch
from ranks import RankError, run_ranks
from tiny import tiny_model
from torch import nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.grpo import supervised_loss
from mbridge_rl.training.lora import (
    ATTENTION_TARGETS,
    LoRAConfig,
    adapted_modules,
    adapters_disabled,
    add_lora,
)
from mbridge_rl.training.trainer import MegatronTrainer, TrainerConfig

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
MLA_DORA = replace(MLA_FUSED, dora=True)
PISSA = LoRAConfig(rank=3, alpha=6.0, start="pissa")
MLA_CANONICAL = LoRAConfig(rank=3, alpha=6.0, targets=MLA_FUSED.targets, canonical=True)
SP: dict[str, Any] = {"sequence_parallel": True}
RECOMPUTE = {"overrides": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}}


@cache
def _checkpoint(variant: str, scratch: Path) -> Path:
    if variant == MLA:
        test_deepseek.checkpoint(scratch / variant, "v3")
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
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-2, micro_batch_size=2))
    with adapters_disabled(trainer.model):
        base = trainer.compute_log_probs(batch).log_probs
    at_first = trainer.compute_log_probs(batch).log_probs
    frozen = {name: p.detach().clone() for name, p in unwrap(model)[0].named_parameters() if name in base_names}
    reports = [trainer.step(batch, supervised_loss) for _ in range(4)]
    adapted = trainer.compute_log_probs(batch).log_probs
    merged = dict(bridge.export_weights(trainer.model))
    plain = bridge.build_model(layout, **build)
    bridge.load_weights(plain, merged)
    return {
        "loss": [report.loss for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
        # PiSSA: W x + B A x - B A x, each of the size of W x and rounded
        "starts_as_base": torch.equal(at_first, base) or (config.keeps_start and torch.allclose(at_first, base, atol=1e-5)),
        "base_stays": all(torch.equal(dict(unwrap(model)[0].named_parameters())[name], p) for name, p in frozen.items()),
        "reference_is_base": torch.equal(trainer.reference_log_probs(batch), base),
        "adapted": adapted,
        "merged": MegatronTrainer(plain, TrainerConfig(micro_batch_size=2)).compute_log_probs(batch).log_probs,
        "base": base,
    }


@cache
def _alone(variant: str, scratch: Path, config: LoRAConfig) -> dict[str, Any]:
    return run_ranks(_train, 1, _checkpoint(variant, scratch), Layout(), {}, config)[0]


CASES: list[tuple[str, Layout, dict[str, Any], LoRAConfig]] = [
    (DENSE, Layout(), RECOMPUTE, ADAPTERS),
    (DENSE, Layout(tp=2), {}, ADAPTERS),
    (DENSE, Layout(tp=2), SP, ADAPTERS),
    (DENSE, Layout(tp=2), SP | RECOMPUTE, ADAPTERS),
    (DENSE, Layout(pp=2), {}, ADAPTERS),
    (DENSE, Layout(cp=2), {}, ADAPTERS),
    (DENSE, Layout(tp=2, dp=2), SP, ADAPTERS),
    (DENSE, Layout(tp=2), SP, CANONICAL),
    (DENSE, Layout(tp=2), {}, SOME_PARTS),
    (DENSE, Layout(pp=2, vpp=2), {}, CANONICAL),
    (FEW_KV_HEADS, Layout(tp=2), SP, CANONICAL),
    (MOE, Layout(tp=2, ep=2, etp=1), SP, ATTENTION),
    (MOE, Layout(tp=2, ep=2, etp=1), SP, ADAPTERS),
    (MOE, Layout(tp=2), SP, CANONICAL),
    (MOE, Layout(ep=2, dp=2), {"grouped_experts": False}, ADAPTERS),
    (MLA, Layout(tp=2), SP, MLA_CANONICAL),
    (MLA, Layout(tp=2, ep=2, etp=1), SP, MLA_FUSED),
    (DENSE, Layout(tp=2), SP | RECOMPUTE, DORA),
    (DENSE, Layout(pp=2, tp=2), {}, DORA_PARTS),
    (MOE, Layout(tp=2), SP, DORA),
    (MLA, Layout(tp=2, ep=2, etp=1), SP, MLA_DORA),
    (DENSE, Layout(tp=2), SP, PISSA),
    (MOE, Layout(tp=2), SP, replace(PISSA, canonical=True)),
]


@pytest.mark.parametrize(("variant", "layout", "build", "config"), CASES, ids=str)
def test_adapters_train_as_in_one_process(
    variant: str, layout: Layout, build: dict[str, Any], config: LoRAConfig, scratch: Path
) -> None:
    alone = _alone(variant, scratch, config)
    for found in run_ranks(_train, layout.world_size, _checkpoint(variant, scratch), layout, build, config):
        assert found["starts_as_base"]
        assert found["base_stays"]
        assert found["reference_is_base"]
        # fp32, reductions in another order; the gradient norm counts every adapter exactly once
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
        assert (found["adapted"] - found["base"]).abs().max() > 0.1
        # fp32: W x + B A x against (W + B A) x
        torch.testing.assert_close(found["merged"], found["adapted"], atol=2e-5, rtol=1e-5)


def _gradients(rank: int, checkpoint: Path, layout: Layout, build: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of the adapters, by name; `B` is made not zero, so that `A` has one."""
    model, batch = _adapted(checkpoint, layout, build, ADAPTERS), _batch()
    for _, module in adapted_modules(model):
        whole = torch.randn(module.weight.shape[0] * 2, 3, generator=torch.Generator().manual_seed(5)) * 0.1
        # the same rows whatever the rank: gate and up, or q, k and v, need no sorting then
        module.lora_b.data.copy_(whole[0].expand_as(module.lora_b))
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=0.0, clip_grad=0.0, micro_batch_size=2))
    trainer.step(batch, supervised_loss)
    return {
        f"{name}.{factor}": getattr(module, factor).main_grad.clone()
        for name, module in adapted_modules(trainer.model)
        for factor in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize("build", [{}, SP], ids=str)
def test_every_gradient_equals_one_process(build: dict[str, Any], scratch: Path) -> None:
    checkpoint = _checkpoint(DENSE, scratch)
    alone = run_ranks(_gradients, 1, checkpoint, Layout(), {})[0]
    ranks = run_ranks(_gradients, 2, checkpoint, Layout(tp=2), build)
    for name, expected in alone.items():
        parts = [rank[name] for rank in ranks]
        if name.endswith(("linear_proj.lora_a", "linear_fc2.lora_a")):
            found = torch.cat(parts, dim=1)
        elif name.endswith(("linear_qkv.lora_b", "linear_fc1.lora_b")):
            found, expected = torch.cat(parts).sum(0), expected.sum(0)  # rows are dealt to ranks by groups and halves
        else:
            assert torch.equal(parts[0], parts[1])
            found = parts[0]
        # fp32, gradients of the order of 1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


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
    for name, whole in alone.items():
        row_parallel = name.endswith(("linear_proj", "linear_fc2"))
        assert torch.equal(torch.cat([first[name], second[name]], 1) if row_parallel else first[name], whole)
    stages = run_ranks(_initial, 2, checkpoint, Layout(pp=2))
    assert all(torch.equal((stages[0] | stages[1])[name], whole) for name, whole in alone.items())


def _refuse(rank: int, checkpoint: Path, config: LoRAConfig, twice: bool = False) -> None:
    initialize_parallel(Layout())
    model = AutoBridge.from_pretrained(checkpoint).build_model(Layout())
    try:
        add_lora(model, config)
    except (NotImplementedError, ValueError):
        assert all(parameter.requires_grad for parameter in model[0].parameters())  # nothing was changed
        raise
    if twice:
        add_lora(model, config)


def test_refusals_name_the_layer_and_what_is_supported(scratch: Path) -> None:
    dense, moe = _checkpoint(DENSE, scratch), _checkpoint(MOE, scratch)
    with pytest.raises(RankError, match=r"NotImplementedError: LoRA on decoder\.layers\.0\.mlp\.router \(TopKRouter\)"):
        run_ranks(_refuse, 1, moe, LoRAConfig(targets=("router",)))
    with pytest.raises(RankError, match=r"no layer of this model has a linear named in_proj; choose from linear_fc1.*q_proj"):
        run_ranks(_refuse, 1, dense, LoRAConfig(targets=("in_proj",)))
    with pytest.raises(RankError, match="rank must be at least 1"):
        run_ranks(_refuse, 1, dense, LoRAConfig(rank=0))
    with pytest.raises(RankError, match="has an adapter already"):
        run_ranks(_refuse, 1, dense, ADAPTERS, True)
