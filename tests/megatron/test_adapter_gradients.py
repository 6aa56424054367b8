"""Gradients of adapters, name by name, against those of the real `peft` on Transformers' model, on every kind of layout."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import deepseek_models
import pytest
import torch
from ranks import run_ranks
from tiny import DENSE as SIZES
from tiny import tiny_model
from tolerance import assert_gradients_near, assert_near, backward, forward
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.lora.attach import add_lora
from mbridge_rl.megatron.lora.dropout import drop, seed_dropout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.gradients import hf_gradients
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

DENSE, MOE, MIXTRAL, MLA = "qwen2", "qwen3-moe", "mixtral", "deepseek"
SP: dict[str, Any] = {"sequence_parallel": True}
RECOMPUTE = {"overrides": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}}
LORA = LoRAConfig(rank=3, alpha=6.0, canonical=True)
DORA = replace(LORA, dora=True)
OUTPUT = ("linear_fc2", "output_layer")
RANKS, ALPHAS = {"linear_fc2": 5, r".*\.[02]\.self_attn\..*": 2}, {"o_proj": 1.5, r"layers\.1\.mlp\..*": 10.0}
LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
ATTENTION, STACKED = ("linear_qkv", "linear_proj"), ("linear_qkv", "linear_proj", "*.experts.*")

LAYERS, WIDTH = deepseek_models.TINY["num_hidden_layers"], SIZES["intermediate_size"]  # of the deepest of these models


@cache
def _base(variant: str, scratch: Path) -> Path:
    if variant == MLA:
        deepseek_models.checkpoint(scratch / variant, "v3")
    else:
        tiny_model(variant).save_pretrained(scratch / variant)
    return scratch / variant


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter-gradients")


def _batch() -> Batch:
    tokens = torch.randint(2, 515, (4, 12), generator=torch.Generator().manual_seed(0))
    return Batch.from_completions(tokens[:, :5].tolist(), tokens[:, 5:].tolist(), pad_token_id=0)


def _adapters(bridge: AutoBridge, config: LoRAConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = adapter_spec(bridge.spec, config).hf_shapes
    random = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 0.5 + tensor.abs() if name.endswith("magnitude_vector") else tensor for name, tensor in random.items()}


def _gradients(rank: int, base: Path, layout: Layout, build: dict[str, Any], config: LoRAConfig) -> tuple[float, Any]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(base)
    model = bridge.build_model(layout, **build)
    bridge.load_weights(model)
    add_lora(model, config)
    bridge.load_adapter(model, _adapters(bridge, config))
    trainer = MegatronTrainer(model, TrainerConfig(micro_batch_size=2))
    return trainer.compute_gradients(_batch(), supervised_loss).loss, hf_gradients(trainer, bridge)


@cache
def _of_peft(base: Path, config: LoRAConfig, directory: Path) -> tuple[float, dict[str, Tensor]]:
    """The same loss and gradients, by `peft`: it loads what is saved here."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run_ranks(_save, 1, base, config, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, directory, is_trainable=True).eval()
    batch = _batch()
    log_probs = model(batch.tokens).logits[:, :-1].log_softmax(-1).gather(-1, batch.tokens[:, 1:, None])[..., 0]
    loss = -log_probs[:, 4:].mean()
    loss.backward()
    gradients = {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), gradients


def _save(rank: int, base: Path, config: LoRAConfig, directory: Path) -> None:
    initialize_parallel(Layout())
    bridge = AutoBridge.from_pretrained(base)
    model = bridge.build_model()
    bridge.load_weights(model)
    add_lora(model, config)
    bridge.load_adapter(model, _adapters(bridge, config))
    bridge.save_adapter(model, directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "layout", "build", "config"),
    [
        (DENSE, Layout(tp=2), SP, LORA),
        (DENSE, Layout(tp=2), SP | RECOMPUTE, DORA),
        (DENSE, Layout(tp=2), {}, DORA),
        (DENSE, Layout(tp=2, dp=2), SP, replace(LORA, targets=OUTPUT)),
        (DENSE, Layout(tp=2, pp=2), {}, replace(LORA, targets=OUTPUT)),
        (DENSE, Layout(tp=2, pp=2), SP, replace(DORA, rank=4, rank_pattern=RANKS, alpha_pattern=ALPHAS)),
        (DENSE, Layout(pp=2, vpp=2), {}, DORA),
        (DENSE, Layout(dp=2, cp=2), {}, replace(DORA, rslora=True, targets=("q_proj", "v_proj", "up_proj", "down_proj"))),
        (MLA, Layout(tp=2), SP, replace(DORA, targets=LATENT)),
        (MOE, Layout(tp=2, ep=2, etp=1), SP, replace(LORA, targets=STACKED, stacked_experts=True)),
        (MOE, Layout(tp=2), SP, replace(LORA, targets=STACKED, stacked_experts=True)),
        (MIXTRAL, Layout(tp=2, ep=2, etp=1), SP, replace(LORA, targets=STACKED, stacked_experts=True)),
        (MIXTRAL, Layout(tp=2), SP, replace(LORA, targets=STACKED, stacked_experts=True)),
        (MOE, Layout(ep=2, dp=2), {}, replace(DORA, targets=ATTENTION)),
    ],
    ids=[
        "lora-tp-sp",
        "dora-tp-sp-recompute",
        "dora-tp",
        "output-tp-sp",
        "output-tp-pp",
        "dora-ranks-tp-pp",
        "dora-pp",
        "dora-dp-cp",
        "dora-mla",
        "stack-ep",
        "stack-etp",
        "stack-ep-mixtral",
        "stack-etp-mixtral",
        "dora-ep",
    ],
)
def test_gradients_are_those_of_peft(
    variant: str, layout: Layout, build: dict[str, Any], config: LoRAConfig, scratch: Path
) -> None:
    base = _base(variant, scratch)
    expected_loss, expected = _of_peft(base, config, scratch / f"{variant}-{abs(hash(config))}")
    for loss, gradients in run_ranks(_gradients, layout.world_size, base, layout, build, config):
        assert_near(loss, expected_loss, forward(LAYERS, WIDTH), what="loss")
        assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, ep=2, etp=1)], ids=["etp", "ep"])
def test_dora_of_every_expert_has_one_gradient_on_all_layouts(layout: Layout, scratch: Path) -> None:
    """PEFT has no DoRA for experts, so gradients are compared with those of one rank."""
    base = _base(MOE, scratch)
    _, expected = run_ranks(_gradients, 1, base, Layout(), {}, DORA)[0]
    for _, gradients in run_ranks(_gradients, layout.world_size, base, layout, SP, DORA):
        assert_same_gradients(gradients, expected)


def test_recomputed_layers_drop_what_they_dropped(scratch: Path) -> None:
    """With sequence parallelism every rank drops elements of its own part, and the same ones when a layer is recomputed."""
    base, dropping = _base(DENSE, scratch), replace(DORA, dropout=0.5)
    stored = run_ranks(_gradients, 2, base, Layout(tp=2), SP, dropping)
    recomputed = run_ranks(_gradients, 2, base, Layout(tp=2), SP | RECOMPUTE, dropping)
    without = run_ranks(_gradients, 2, base, Layout(tp=2), SP, DORA)
    for (loss, gradients), (recomputed_loss, recomputed_gradients), (loss_without, _) in zip(
        stored, recomputed, without, strict=True
    ):
        assert recomputed_loss == loss
        assert abs(loss - loss_without) > 1e-3
        assert all(torch.equal(recomputed_gradients[name], tensor) for name, tensor in gradients.items())


def _masks(rank: int, layout: Layout) -> dict[str, Tensor]:
    initialize_parallel(layout)
    seed_dropout(3, rank, layout.coordinates(rank))
    ones, modes = torch.ones(64), ("column", "row", "replicated", "expert_column", "expert_row")
    with megatron_runtime():
        masks = {mode: drop(ones, 0.5, mode, sequence_parallel=False) for mode in modes}
        return masks | {"column of a part": drop(ones, 0.5, "column", sequence_parallel=True)}


def test_ranks_that_hold_the_same_elements_drop_the_same_ones() -> None:
    """Ranks 0 and 1 are tensor-parallel ranks of one another, 2 and 3 the next data-parallel replica."""
    first, second, third, fourth = run_ranks(_masks, 4, Layout(tp=2, dp=2, etp=2))
    for mode in ("column", "replicated", "expert_column"):
        assert torch.equal(first[mode], second[mode])
        assert torch.equal(third[mode], fourth[mode])
        assert not torch.equal(first[mode], third[mode])
    for mode in ("row", "expert_row", "column of a part"):
        assert len({tuple(rank[mode].tolist()) for rank in (first, second, third, fourth)}) == 4
    assert set(first["row"].tolist()) == {0.0, 2.0}


def assert_same_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(tensor.any() or "experts" in name for name, tensor in expected.items())
    assert_gradients_near(gradients, expected, backward(LAYERS, WIDTH))
