"""Checkpoints as Transformers 5 has models in memory (`save_original_format=False`): experts stacked, modules renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from live import live
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.stacked_experts import in_memory_spec
from mbridge_rl.hf.source import open_checkpoint

EXPERTS = [
    *("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "moonlight", "kimi-k2"),
    *("glm-4.5", "glm-4.5-air", "glm-4.7-flash", "minimax-m2", "ernie-4.5-moe", "qwen3-next"),
    *("nemotron-3-nano", "nemotron-3-super"),
]


def test_every_family_of_experts_is_among_them() -> None:
    """But those whose checkpoints of the hub stack experts anyway."""
    specs = {variant: AutoBridge.from_config(family.hf_config()).spec for variant, family in FAMILIES.items()}
    assert set(EXPERTS) == {variant for variant, spec in specs.items() if spec.num_experts and in_memory_spec(spec)}


@pytest.mark.parametrize("variant", [*EXPERTS, "nemotron-h"])
def test_what_transformers_has_in_memory_is_read_as_the_familys_own_checkpoint(variant: str, tmp_path: Path) -> None:
    """Every tensor, whole and through the ranks of a layout; what is exported has the family's names."""
    model = FAMILIES[variant].checkpoint(tmp_path / "own")
    model.save_pretrained(tmp_path / "in memory", save_original_format=False)
    bridge = AutoBridge.from_pretrained(tmp_path / "own")
    names = bridge.spec.hf_shapes
    expected = {name: tensor for name, tensor in hf_state(tmp_path / "own").items() if name in names}
    other = AutoBridge.from_pretrained(tmp_path / "in memory")
    opened = open_checkpoint(other.spec, other.hf_config, tmp_path / "in memory")
    assert {name: tensor for name, tensor in opened.items() if name in expected}.keys() == expected.keys()
    layout = ParallelLayout(ep=2, dp=2) if (bridge.spec.num_experts or 1) % 2 == 0 else ParallelLayout()
    assert_same_state(other.unshard(other.shard(opened, layout), layout), expected)
    in_memory = hf_state(tmp_path / "in memory")
    assert_same_state(bridge.unshard(bridge.shard(in_memory, layout), layout), expected)


LAYOUT = ParallelLayout(tp=2, ep=2, etp=1)


def load_in_every_way(rank: int, directory: Path, own: dict[str, Tensor]) -> dict[str, list[str]]:
    bridge, model = live(LAYOUT, directory)
    sources: dict[str, Any] = {"files": None, "state": hf_state(directory), "stream": list(hf_state(directory).items())}
    different = {}
    for name, source in sources.items():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.data.zero_()
        bridge.load_weights(model, iter(source) if isinstance(source, list) else source)
        exported = dict(bridge.export_weights(model))
        different[name] = [hf_name for hf_name in own if not torch.equal(exported[hf_name], own[hf_name])]
        different[name] += bridge.verify(model, directory)
    return different


def test_real_ranks_read_stacked_experts_from_files_state_dicts_and_streams(tmp_path: Path) -> None:
    _, model = tiny_checkpoint(tmp_path / "own", "qwen3-moe")
    model.save_pretrained(tmp_path / "in memory", save_original_format=False)
    for different in run_ranks(load_in_every_way, 2, tmp_path / "in memory", hf_state(tmp_path / "own")):
        assert different == {"files": [], "state": [], "stream": []}


def test_a_quantized_stack(tmp_path: Path) -> None:
    """Stacked experts in fp8 with one scale per block are read, as Transformers' own fp8 experts are stored."""
    _, model = tiny_checkpoint(tmp_path / "own", "qwen3-moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    state, expected = hf_state(tmp_path), hf_state(tmp_path / "own")
    for name in [name for name in state if ".experts." in name]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        experts, rows, columns = state[name].shape
        scale = torch.rand(experts, -(-rows // 16), -(-columns // 16)) + 0.5
        state[f"{name}_scale_inv"] = scale
        dequantized = state[name].float() * scale.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :rows, :columns]
        prefix = name.rpartition(".")[0]
        for expert in range(experts):
            linears = {"gate_proj": dequantized[expert, : rows // 2], "up_proj": dequantized[expert, rows // 2 :]}
            linears = linears if name.endswith("gate_up_proj") else {"down_proj": dequantized[expert]}
            expected |= {f"{prefix}.{expert}.{linear}.weight": values.contiguous() for linear, values in linears.items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    bridge = AutoBridge.from_pretrained(tmp_path)
    opened = open_checkpoint(bridge.spec, bridge.hf_config, tmp_path)
    assert_same_state(bridge.unshard(bridge.shard(opened, LAYOUT), LAYOUT), expected)


def test_a_stack_of_another_model_is_named(tmp_path: Path) -> None:
    _, model = tiny_checkpoint(tmp_path, "qwen3-moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    state = hf_state(tmp_path)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({**state, stack: state[stack][:7].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    bridge = AutoBridge.from_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match=rf"{stack} has shape \[7, 64, 64\], the config says \[8, 64, 64\]"):
        open_checkpoint(bridge.spec, bridge.hf_config, tmp_path)
