"""fp8 on the trainer's side: every layout gives the bits of one process, and readers of the format understand them."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from pathlib import Path

import deepseek_models
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state, tiny_checkpoint, tiny_config
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import model_spec
from mbridge_rl.core import virtual
from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.quantize import FP8, Fp8, dequantize, maxima, quantize, quantized_spec, scale_names, scales
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.live_fp8 import QuantizedLive
from mbridge_rl.hf.dequantize import dequantize_fp8
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.payload.difference import integers

SPECS = {
    "qwen2": lambda: tiny_config("qwen2"),
    "qwen3-moe": lambda: tiny_config("qwen3-moe"),
    "deepseek": lambda: deepseek_models.config("v3"),
}
SCHEMES = {"blocks": Fp8((40, 24)), "tensor": Fp8(None)}  # blocks that no cut follows; 128x128 is larger than tiny tensors


def _spec(family: str) -> ModelSpec:
    return model_spec(SPECS[family]())


def _random_state(spec: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in spec.hf_shapes.items()}
    first = next(name for name in state if name.endswith("o_proj.weight"))
    state[first][:50, :30] = 0  # a block of zeros
    return {name: tensor.to(spec.hf_dtypes(dtype)[name]) for name, tensor in state.items()}


def _of_one_process(spec: ModelSpec, scheme: Fp8, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `quantize` makes of whole tensors."""
    expected = dict(state)
    for name, scale in scale_names(quantized_spec(spec, scheme), scheme).items():
        expected[name], expected[scale] = quantize(state[name], scheme)
    return expected


class OneOfMany(RankGroup):
    """A virtual rank's group: the maximum over all ranks was computed before."""

    def __init__(self, largest: Tensor) -> None:
        super().__init__()
        self._largest = largest

    def maximum(self, values: Tensor) -> Tensor:
        return self._largest


def _quantized_ranks(
    spec: ModelSpec, scheme: Fp8, layout: ParallelLayout, state: dict[str, Tensor]
) -> dict[int, QuantizedLive]:
    fp8 = quantized_spec(spec, scheme)
    plain = megatron_side(spec, layout)
    shards = {rank: virtual.allocate(plain.on(rank), spec.hf_dtypes(torch.bfloat16)) for rank in range(layout.world_size)}
    virtual.run(compile_plan(spec, hf_side(spec), plain), {0: state}, shards)
    sides = {rank: megatron_side(fp8, layout, rank) for rank in shards}
    flat = [torch.cat([v.flatten() for v in maxima(fp8, scheme, sides[rank], shards[rank]).values()]) for rank in shards]
    largest = torch.stack(flat).amax(0)
    return {rank: QuantizedLive(fp8, scheme, sides[rank], shards[rank], OneOfMany(largest)) for rank in shards}


def _layouts(spec: ModelSpec) -> list[ParallelLayout]:
    layouts = []
    for tp, pp, ep, etp in itertools.product((1, 2, 4, 8), (1, 2), (1, 2), (1, 2)):
        if spec.num_experts or (ep, etp) == (1, 1):
            stages = None if spec.num_layers % pp == 0 else (3, 2)
            layout = ParallelLayout(tp=tp, pp=pp, ep=ep, etp=etp, dp=max(1, ep * etp // tp), stage_layers=stages)
            try:
                spec.validate(layout)
            except LayoutError:
                continue
            layouts.append(layout)
    return layouts


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("family", SPECS)
def test_every_layout_gives_the_bits_of_one_process(family: str, scheme: Fp8) -> None:
    spec = _spec(family)
    fp8, state = quantized_spec(spec, scheme), _random_state(spec)
    expected = _of_one_process(spec, scheme, state)
    assert sum(tensor.dtype == FP8 for tensor in expected.values()) > 20
    dtypes = fp8.hf_dtypes(torch.bfloat16)
    assert dtypes == {name: tensor.dtype for name, tensor in expected.items()}
    for layout in _layouts(spec)[:: 1 if family == "qwen2" else 6]:
        ranks = _quantized_ranks(spec, scheme, layout, state)
        exported = virtual.allocate(hf_side(fp8), dtypes)
        virtual.run(compile_plan(fp8, megatron_side(fp8, layout), hf_side(fp8)), ranks, {0: exported})
        for name, tensor in expected.items():
            assert torch.equal(integers(exported[name]), integers(tensor)), (layout, name)


def test_what_was_quantized_is_freed_with_its_transfer() -> None:
    """At once, not when Python looks for cycles."""
    spec = _spec("qwen2")
    ranks = _quantized_ranks(spec, Fp8(), ParallelLayout(), _random_state(spec))
    live = ranks.pop(0)
    fp8 = next(tensor for tensor in live.values() if tensor.dtype == FP8)
    freed = weakref.ref(fp8)
    gc.disable()
    try:
        del live, fp8
        assert freed() is None
    finally:
        gc.enable()


def test_quantized_weights_are_as_near_as_fp8_can_be() -> None:
    weight = torch.randn(300, 515) * torch.logspace(-3, 3, 515)
    for scheme in (Fp8(), Fp8(None)):
        fp8, scale = quantize(weight, scheme)
        assert fp8.float().abs().max() == 448.0
        restored = dequantize(fp8, scale, scheme, torch.float32)
        wide = dequantize(torch.ones_like(weight).to(FP8), scale, scheme, torch.float32)
        # e4m3 has 3 bits of mantissa: half a unit of the last, and below 2^-6 the spacing is 2^-9
        assert ((restored - weight).abs() <= torch.maximum(weight.abs() * 2**-4, wide * 2**-10) * 1.0001).all()
    fp8, scale = quantize(weight, Fp8())
    assert torch.equal(
        dequantize_fp8("w", fp8, scale, (128, 128), torch.bfloat16), dequantize(fp8, scale, Fp8(), torch.bfloat16)
    )
    zeros, one = quantize(torch.zeros(3, 4), Fp8())
    assert not zeros.float().any()
    assert one.item() == 1.0
    assert scales({"": torch.tensor([0.0, 448.0])})[""].tolist() == [1.0, 1.0]


def test_stacked_experts_are_refused() -> None:
    from dataclasses import replace

    spec = _spec("qwen2")
    rule = next(rule for rule in spec.rules if rule.megatron_name.endswith("linear_fc2.weight"))
    stacked = replace(rule, parts=(replace(rule.parts[0], hf_name="model.layers.{layer}.experts.down_proj"),))
    with pytest.raises(UnsupportedModelError, match=r"experts\.down_proj .*weights of single linears only"):
        quantized_spec(replace(spec, rules=(stacked,)), Fp8())


def _save(rank: int, checkpoint: Path, layout: ParallelLayout, directory: Path, scheme: Fp8) -> dict[str, Tensor]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    bridge.save_quantized(model, directory, scheme)
    return dict(bridge.export_quantized_weights(model, scheme))


@pytest.mark.parametrize(
    ("variant", "layout", "scheme"),
    [
        ("qwen3", ParallelLayout(tp=2, pp=2), Fp8()),
        ("qwen3", ParallelLayout(tp=2), Fp8(None)),
        ("qwen3-moe", ParallelLayout(tp=2, ep=2, etp=1), Fp8()),
    ],
    ids=str,
)
def test_real_ranks_save_what_transformers_dequantizes(
    variant: str, layout: ParallelLayout, scheme: Fp8, tmp_path: Path
) -> None:
    # multiples of 128: Transformers takes the block's size for the tensor's over the number of scales
    sizes = {"hidden_size": 256, "head_dim": 32, "intermediate_size": 384, "moe_intermediate_size": 128}
    checkpoint, _ = tiny_checkpoint(tmp_path / "plain", variant, **sizes)
    ranks = run_ranks(_save, layout.world_size, checkpoint, layout, tmp_path / "fp8", scheme)
    bridge = AutoBridge.from_pretrained(checkpoint)
    expected = _of_one_process(bridge.spec, scheme, hf_state(checkpoint))
    assert_same_state(hf_state(tmp_path / "fp8"), expected)
    for exported in ranks:
        assert_same_state(exported, expected)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config.get("weight_block_size") == (None if scheme.block is None else [128, 128])
    assert "lm_head" in config["modules_to_not_convert"]
    plain = dict(expected)
    for name, scale in scale_names(quantized_spec(bridge.spec, scheme), scheme).items():
        plain[name] = dequantize(expected[name], plain.pop(scale), scheme, torch.float32)
    save_file(plain, checkpoint / "model.safetensors", {"format": "pt"})
    if scheme.block is not None:  # Transformers knows no other scales
        assert_same_state(_transformers_state(tmp_path / "fp8", dequantize=True), _transformers_state(checkpoint))
    back = run_ranks(_load, 2, tmp_path / "fp8", ParallelLayout(tp=2))  # and our own reader
    assert_same_state(back[0], plain)


def _transformers_state(directory: Path, **quantization: bool) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    options = {"quantization_config": FineGrainedFP8Config(**quantization)} if quantization else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).state_dict()


def _load(rank: int, directory: Path, layout: ParallelLayout) -> dict[str, Tensor]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    return dict(bridge.export_weights(model))
