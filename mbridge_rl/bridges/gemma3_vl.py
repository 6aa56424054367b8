"""Gemma 3 with vision. Only an image's tokens attend to later tokens of the same image: text alone is causal, as in the
text-only model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.vision import Tower, with_vision
from mbridge_rl.bridges.gemma import gemma3
from mbridge_rl.core.model import ModelSpec

_NAMES = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


def _vision_tower(hf: Any) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_config(hf.vision_config, trust_remote_code=False)


def _projector(hf: Any) -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    return Gemma3MultiModalProjector(hf)


_TOWERS = {
    "vision_tower": Tower(_vision_tower, "vision_tower.vision_model"),
    "multi_modal_projector": Tower(_projector, "multi_modal_projector"),
}


def gemma3_vl(hf: ConfigReader) -> ModelSpec:
    """The spec of Gemma 3 with vision. Names in checkpoints on the hub begin with `vision_tower.vision_model`, those in
    checkpoints that Transformers saves today with `vision_tower`."""
    hf.ignore("mm_tokens_per_image", "boi_token_index", "eoi_token_index")
    hf.nested("text_config").require("final_logit_softcapping", None)  # Transformers' model with vision ignores it
    spec = with_vision(hf, gemma3, _NAMES, _TOWERS)
    return replace(spec, alternatives=(spec.renamed({"vision_tower.vision_model.": "vision_tower."}),))
