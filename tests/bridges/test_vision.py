"""What vision-language models have beside text: towers that training leaves alone, and several spellings of checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parallel import initialize_parallel


def test_towers_are_frozen_and_only_on_the_first_stage(tmp_path: Path) -> None:
    """DDP's gradient buffers leave them out; a bf16 model holds them in bf16."""
    FAMILIES["qwen3-vl"].checkpoint(tmp_path)
    first, last = run_ranks(towers_of_a_training_model, 2, tmp_path)
    assert last == {}
    assert first
    assert set(first.values()) == {(torch.bfloat16, False)}


def towers_of_a_training_model(rank: int, directory: Path) -> dict[str, tuple[torch.dtype, bool]]:
    layout = initialize_parallel(ParallelLayout(pp=2, stage_layers=(2, 1)))
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, dtype=torch.bfloat16, ddp=True)
    bridge.load_weights(model)
    tower_parameters = {
        name: (parameter.dtype, parameter.requires_grad)
        for name, parameter in unwrap(model)[0].named_parameters()
        if name.startswith("visual.")
    }
    buffered = sum(buffer.numel_unpadded for buffer in model[0].buffers)
    assert buffered == sum(parameter.numel() for parameter in model[0].parameters() if parameter.requires_grad)
    return tower_parameters


@pytest.mark.parametrize("hub", [True, False])
def test_a_checkpoint_keeps_its_spelling(hub: bool, tmp_path: Path) -> None:
    """The hub's Gemma 3 says `vision_tower.vision_model`, today's Transformers `vision_tower`."""
    FAMILIES["gemma3-vl"].checkpoint(tmp_path)
    state = hf_state(tmp_path)
    if hub:
        state = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in state.items()}
        save_file(state, tmp_path / "model.safetensors")
    bridge, layout = AutoBridge.from_pretrained(tmp_path), ParallelLayout(tp=2)
    assert_same_state(bridge.unshard(bridge.shard(state, layout), layout), state)


def test_pixels_are_refused(tmp_path: Path) -> None:
    """And so are tokens that stand for them: without their features, the logits would be wrong in silence."""
    family = FAMILIES["nemotron-omni"]
    replace(family, config={**family.config, "image_token_id": 514}).checkpoint(tmp_path)
    [(pixels, tokens)] = run_ranks(refusals, 1, tmp_path)
    assert "text only" in pixels
    assert "pixel_values" in pixels
    assert "514" in tokens


def refusals(rank: int, directory: Path) -> tuple[str, str]:
    initialize_parallel(ParallelLayout())
    bridge = AutoBridge.from_pretrained(directory)
    [model] = bridge.build_model()
    positions = torch.arange(3)[None]
    with megatron_runtime():
        with pytest.raises(UnsupportedModelError) as pixels:
            model(torch.tensor([[1, 2, 3]]), positions, None, pixel_values=torch.zeros(1, 3, 8, 8))
        with pytest.raises(UnsupportedModelError) as tokens:
            model(torch.tensor([[1, 514, 3]]), positions, None)
    return str(pixels.value), str(tokens.value)
