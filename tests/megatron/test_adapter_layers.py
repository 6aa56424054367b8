"""Adapters of some layers: PEFT's `layers_to_transform`, regular expressions, `exclude_modules`, and `LoRAConfig.layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live import live
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import assert_same_state, tiny_checkpoint, tiny_config
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import adapted_linears, adapter_spec
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.hf.peft import ADAPTER_FILE
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.lora.attach import add_lora
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.run.config import TrainerConfig
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer

TOKENS = torch.randint(2, 515, (2, 12), generator=torch.Generator().manual_seed(4))
# fp32 sums of four layers in another order, on logits of about 1
TOLERANCE = 1e-4

MIXED = r".*layers\.(0|2)\.self_attn\.(q_proj|k_proj|v_proj)|.*layers\.1\.mlp\.down_proj"
CASES: dict[str, tuple[str, ParallelLayout, dict[str, Any], tuple[tuple[str, ...], dict[str, tuple[int, ...]]]]] = {
    "layers_to_transform": (
        "llama",
        ParallelLayout(pp=2),
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
        (("q_proj", "o_proj"), {"q_proj": (1, 3), "o_proj": (1, 3)}),
    ),
    "a regular expression": (
        "llama",
        ParallelLayout(tp=2),
        {"target_modules": MIXED},
        (
            ("q_proj", "k_proj", "v_proj", "down_proj"),
            {"q_proj": (0, 2), "k_proj": (0, 2), "v_proj": (0, 2), "down_proj": (1,)},
        ),
    ),
    "exclude_modules, with DoRA": (
        "qwen2",
        ParallelLayout(tp=2),
        {"target_modules": ["k_proj", "v_proj"], "exclude_modules": r".*layers\.[02]\.self_attn\.k_proj", "use_dora": True},
        (("k_proj", "v_proj"), {"k_proj": (1, 3)}),
    ),
}


def of_peft(base: Path, directory: Path, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A random adapter that `peft` made and saved: its logits, and the weights with it merged in."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base_model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(base_model, peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                random = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(parameter * (1 + random) if "magnitude" in name else random)
        logits = model.eval()(TOKENS).logits
    model.save_pretrained(directory)
    return logits, model.merge_and_unload().state_dict()


def load_save_and_merge(
    rank: int, base: Path, adapter: Path, layout: ParallelLayout
) -> tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor]]:
    bridge, model = live(layout, base)
    add_lora(model, bridge.adapter_config(adapter))
    bridge.load_adapter(model, adapter)
    bridge.save_adapter(model, adapter.parent / "ours")
    adapters, merged = dict(bridge.export_adapter_weights(model)), dict(bridge.export_weights(model))
    return forward_logits(model, TOKENS), adapters, merged


@pytest.mark.parametrize("kind", CASES)
def test_adapters_of_some_layers_load_act_alike_merge_and_come_back(kind: str, tmp_path: Path) -> None:
    variant, layout, options, targets = CASES[kind]
    base, _ = tiny_checkpoint(tmp_path / "base", variant)
    expected, merged = of_peft(base, tmp_path / "peft", **options)
    config = AutoBridge.from_pretrained(base).adapter_config(tmp_path / "peft")
    assert (config.targets, dict(config.layers)) == targets
    made = load_file(tmp_path / "peft" / ADAPTER_FILE)
    for logits, adapters, weights in run_ranks(load_save_and_merge, 2, base, tmp_path / "peft", layout):
        assert_same_state(adapters, made)
        assert all((weights[name] - merged[name]).abs().max() < 1e-5 for name in weights)  # one product of rank 3, in fp32
        if logits is not None:
            assert (logits - expected).abs().max() < TOLERANCE
    assert_same_state(load_file(tmp_path / "ours" / ADAPTER_FILE), made)
    import peft
    import transformers

    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, expected)


EXPERTS = LoRAConfig(rank=2, alpha=4.0, targets=("*.experts.*", "linear_proj"), layers={"*.experts.*": (0, 3)})


def made_here(rank: int, base: Path, layout: ParallelLayout, config: LoRAConfig, saved: Path) -> LoRAConfig:
    bridge, model = live(layout, base)
    add_lora(model, config)
    bridge.save_adapter(model, saved)
    return bridge.adapter_config(saved)


@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_of_some_layers_that_are_made_here(stacked: bool, tmp_path: Path) -> None:
    """Some layers get adapters, of experts as well, apart or as PEFT's stacks. The saved config says which layers have them."""
    base, _ = tiny_checkpoint(tmp_path / "base", "qwen3-moe", mlp_only_layers=[])
    config = LoRAConfig(**{**vars(EXPERTS), "stacked_experts": stacked})
    spec = AutoBridge.from_pretrained(base).spec
    (read_config, *_) = run_ranks(made_here, 2, base, ParallelLayout(tp=2, ep=2, etp=1), config, tmp_path / "adapter")
    assert adapted_linears(spec, read_config).keys() == adapted_linears(spec, config).keys()
    with_experts = {int(name.split(".")[2]) for name in adapted_linears(spec, read_config) if ".experts." in name}
    assert with_experts == {0, 3}
    assert set(load_file(tmp_path / "adapter" / ADAPTER_FILE)) == set(adapter_spec(spec, config).hf_shapes)


def train(rank: int, base: Path, config: LoRAConfig, layout: ParallelLayout) -> list[float]:
    _, model = live(layout, base)
    add_lora(model, config)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-2))
    batch = Batch.from_completions(TOKENS[:, :4].tolist(), TOKENS[:, 4:].tolist(), pad_token_id=0)
    return [trainer.step(batch, supervised_loss).loss for _ in range(3)]


@pytest.mark.parametrize("layers", [(1, 3), (3,)], ids=str)
def test_adapters_of_some_layers_train_alike_on_every_layout(layers: tuple[int, ...], tmp_path: Path) -> None:
    """Also where a pipeline stage has none."""
    base, _ = tiny_checkpoint(tmp_path, "llama")
    config = LoRAConfig(rank=2, targets=("linear_qkv", "down_proj"), layers={"linear_qkv": layers, "down_proj": layers})
    ((*alone,),) = run_ranks(train, 1, base, config, ParallelLayout())
    assert alone[2] < alone[0]
    for losses in run_ranks(train, 2, base, config, ParallelLayout(pp=2)):
        assert losses == pytest.approx(alone, rel=1e-4)  # fp32 sums in another order, over three steps


def test_some_experts_of_a_layer_are_refused_by_name(tmp_path: Path) -> None:
    base, _ = tiny_checkpoint(tmp_path / "base", "qwen3-moe", mlp_only_layers=[])
    config = LoRAConfig(rank=2, targets=("*.experts.*",), canonical=True)
    run_ranks(made_here, 1, base, ParallelLayout(), config, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    some = {name: tensor for name, tensor in state.items() if "layers.2.mlp.experts.5.up_proj" not in name}
    save_file(some, tmp_path / "adapter" / ADAPTER_FILE)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.experts\.5\.up_proj have none: .*all of them"):
        AutoBridge.from_pretrained(base).adapter_config(tmp_path / "adapter")


def test_layers_that_mean_nothing_are_refused() -> None:
    spec = AutoBridge.from_config(tiny_config("qwen3-moe")).spec
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": {"q_proj": (1,)}}, r"'q_proj' is none of the targets linear_qkv"),
        (
            {"targets": ("q_proj",), "layers": {"q_proj": (3, 4)}},
            r"'q_proj' is given layers \[4\], this model has .* \[0, 1, 2, 3\]",
        ),
        ({"targets": ("*.experts.*",), "layers": {"*.experts.*": (1,)}}, r"given layers \[1\], .* in layers \[0, 2, 3\]"),
        ({"targets": ("lm_head",), "layers": {"lm_head": (0,)}}, r"'lm_head' names output_layer, which is in no layer"),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            adapter_spec(spec, LoRAConfig(**fields))
    different = {"gate_up_proj": (0, 2), "down_proj": (0,)}
    stacks = LoRAConfig(targets=tuple(different), layers=different, stacked_experts=True)
    with pytest.raises(UnsupportedModelError, match=r"gate_up_proj and .*down_proj are adapted in different layers"):
        adapter_spec(spec, stacks)
