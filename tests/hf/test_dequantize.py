"""Quantized checkpoints are read as Transformers itself reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state, tiny_checkpoint

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.hf.dequantize import Dequantized
from mbridge_rl.hf.source import open_checkpoint
from mbridge_rl.megatron.parallel import initialize_parallel

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_fp8_blocks_with_ragged_edges() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator)
    state = {"a.weight": weight, "a.weight_scale_inv": scale, "norm.weight": torch.ones(3)}
    plain = Dequantized(state, FP8, torch.bfloat16)
    assert list(plain) == ["a.weight", "norm.weight"]
    dequantized = plain["a.weight"]
    for row, column in ((0, 0), (127, 128), (128, 299), (199, 256)):
        expected = (weight[row, column].float() * scale[row // 128, column // 128]).bfloat16()
        assert torch.equal(dequantized[row, column], expected)
    assert plain["norm.weight"] is state["norm.weight"]


def test_mxfp4_equals_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 4), generator=generator).to(torch.uint8)
    plain = Dequantized({"w_blocks": blocks, "w_scales": scales}, {"quant_method": "mxfp4"}, torch.bfloat16)
    assert list(plain) == ["w"]
    assert plain["w"].shape == (3, 128, 10)
    assert torch.equal(plain["w"], convert_moe_packed_tensors(blocks, scales))


def test_what_does_not_fit_is_named() -> None:
    weight = torch.zeros(200, 300).to(torch.float8_e4m3fn)
    with pytest.raises(StateMismatchError, match=r"a.weight_scale_inv has shape \[2, 2\], blocks of .* need \[2, 3\]"):
        Dequantized({"a.weight": weight, "a.weight_scale_inv": torch.ones(2, 2)}, FP8, torch.bfloat16)["a.weight"]
    with pytest.raises(StateMismatchError, match=r"scales without weights: a\.weight_scale_inv"):
        Dequantized({"a.weight_scale_inv": torch.ones(2, 2)}, FP8, torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="quant_method='gptq'"):
        Dequantized({}, {"quant_method": "gptq"}, torch.bfloat16)


def test_a_quantized_checkpoint_loads_and_saves_plain(tmp_path: Path) -> None:
    """Through the bridge: fp8 blocks in, the plain weights that they stand for out, and a config that says so."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    state = {name: tensor.bfloat16() for name, tensor in hf_state(directory).items()}
    quantized = [name for name in state if name.endswith("_proj.weight")]
    expected = dict(state)
    for name in quantized:
        rows, columns = state[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale
        by_element = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        expected[name] = (state[name].float() * by_element).bfloat16()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": FP8, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    run_ranks(load_and_save, 2, directory, ParallelLayout(tp=2))
    assert_same_state(hf_state(directory / "saved"), expected)
    assert "quantization_config" not in json.loads((directory / "saved" / "config.json").read_text())


def test_mxfp4_experts_load(tmp_path: Path) -> None:
    """GPT-OSS as released: what arrives in Megatron is what Transformers makes of the same blocks and scales."""
    from families import FAMILIES
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    FAMILIES["gpt-oss"].checkpoint(tmp_path)
    state = {name: tensor.bfloat16() for name, tensor in hf_state(tmp_path).items()}
    expected, generator = dict(state), torch.Generator().manual_seed(0)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 128, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config | quantized))
    run_ranks(load_and_save, 2, tmp_path, ParallelLayout(ep=2, dp=2))
    assert_same_state(hf_state(tmp_path / "saved"), expected)


def load_and_save(rank: int, directory: Path, layout: ParallelLayout) -> None:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(dtype=torch.bfloat16)
    bridge.load_weights(model)
    bridge.save_pretrained(model, directory / "saved")


def fp8_checkpoint(directory: Path, quantization: dict[str, Any], scale_shape: Any, name: str) -> dict[str, torch.Tensor]:
    """A llama whose linears are fp8 with scales `{linear}.{name}` of the shape that `scale_shape(rows, columns)` gives, beside
    scales of activations and of KV caches; returns the tensors that it stands for."""
    tiny_checkpoint(directory, "llama")
    state = {name: tensor.bfloat16() for name, tensor in hf_state(directory).items()}
    expected, generator = dict(state), torch.Generator().manual_seed(3)
    for weight in [weight for weight in state if weight.endswith("_proj.weight")]:
        linear, (rows, columns) = weight.removesuffix(".weight"), state[weight].shape
        scale = torch.rand(scale_shape(rows, columns), generator=generator) + 0.5
        state[weight] = state[weight].to(torch.float8_e4m3fn)
        state[f"{linear}.{name}"] = scale
        state[f"{linear}.input_scale"] = torch.tensor(0.25)
        by_row = scale if scale.numel() == 1 else scale.reshape(rows, 1) if scale.numel() == rows else None
        if by_row is None:
            by_row = scale.repeat_interleave(16, 0).repeat_interleave(32, 1)[:rows, :columns]
        expected[weight] = (state[weight].float() * by_row).bfloat16()
    state["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization, "dtype": "bfloat16"}))
    return expected


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
FP8_SCHEMES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "one scale, static activations": (STATIC, lambda rows, columns: (), "weight_scale"),
    "one scale, as Ministral 3 has it": (STATIC, lambda rows, columns: (), "weight_scale_inv"),
    "blocks, static activations": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [16, 32]},
        lambda rows, columns: (-(-rows // 16), -(-columns // 32)),
        "weight_scale_inv",
    ),
    "compressed-tensors, tensor": (compressed(strategy="tensor"), lambda rows, columns: (1,), "weight_scale"),
    "compressed-tensors, channel": (compressed(strategy="channel"), lambda rows, columns: (rows, 1), "weight_scale"),
    "compressed-tensors, block": (
        compressed(strategy="block", block_structure=[16, 32]),
        lambda rows, columns: (-(-rows // 16), -(-columns // 32)),
        "weight_scale",
    ),
}


@pytest.mark.parametrize("kind", FP8_SCHEMES)
def test_every_fp8_scheme_is_read_and_shards_as_what_it_stands_for(kind: str, tmp_path: Path) -> None:
    expected = fp8_checkpoint(tmp_path, *FP8_SCHEMES[kind])
    bridge = AutoBridge.from_pretrained(tmp_path)
    opened = open_checkpoint(bridge.spec, bridge.hf_config, tmp_path)
    assert_same_state(dict(opened), expected)
    layout = ParallelLayout(tp=2, pp=2)
    assert_same_state(bridge.unshard(bridge.shard(opened, layout), layout), expected)


def test_scales_of_stacked_experts() -> None:
    """As Transformers holds them: blocks of every expert, or one scale each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 40, 64, generator=generator).to(torch.float8_e4m3fn)
    blocks = torch.rand(3, 3, 2, generator=generator)
    state = {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale_inv": blocks}
    state["experts.gate_up_proj_activation_scale"] = torch.ones(3)
    plain = Dequantized(state, FP8 | {"weight_block_size": [16, 32]}, torch.float32)
    assert list(plain) == ["experts.gate_up_proj"]
    by_element = blocks.repeat_interleave(16, 1).repeat_interleave(32, 2)[:, :40]
    assert torch.equal(plain["experts.gate_up_proj"], weight.float() * by_element)
    each = Dequantized({**state, "experts.gate_up_proj_scale_inv": blocks[:, 0, 0]}, FP8, torch.float32)
    assert torch.equal(each["experts.gate_up_proj"], weight.float() * blocks[:, :1, :1])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "int8": (compressed(type="int", strategy="channel"), r"config_groups\.group_0\.weights\.type='int'"),
    "fp4": (compressed(num_bits=4, strategy="group"), r"config_groups\.group_0\.weights\.num_bits=4"),
    "packed": ({**compressed(), "format": "pack-quantized"}, r"compressed-tensors' and format='pack-quantized'"),
    "sparse": ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format='sparse-24-bit"),
    "rotated": (
        {**compressed(), "transform_config": {"config_groups": {"R1": {}}}},
        r"transform_config\.config_groups=\[.R1",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, r"quant_method='modelopt'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_schemes_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path, REFUSED[kind][0], lambda rows, columns: (), "weight_scale")
    with pytest.raises(UnsupportedModelError, match=REFUSED[kind][1]):
        AutoBridge.from_pretrained(tmp_path)


def test_tensors_that_are_not_the_schemes_are_refused_with_it(tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path, FP8, lambda rows, columns: (), "weight_zero_point")
    bridge = AutoBridge.from_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match=r"unexpected .*weight_zero_point.*quantization_config.quant_method='fp8'"):
        open_checkpoint(bridge.spec, bridge.hf_config, tmp_path)
