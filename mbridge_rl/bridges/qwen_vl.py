"""Qwen2.5-VL, Qwen3-VL and Qwen3.5 with vision. A text token's three rotary coordinates are all the same, so that the language
models rotate as their text-only relatives do."""

from __future__ import annotations

from typing import Any

from torch import nn

from mbridge_rl.bridges.qwen2 import qwen2
from mbridge_rl.bridges.qwen3 import qwen3
from mbridge_rl.bridges.qwen3_5 import qwen3_5
from mbridge_rl.bridges.vision import Tower, with_vision
from mbridge_rl.core.model import ModelSpec

_UNDER_MODEL = {"model.": "model.language_model."}


def qwen2_5_vl(hf: Any) -> ModelSpec:
    return with_vision(hf, qwen2, {}, {"visual": Tower(_qwen2_5, "visual")})


def qwen3_vl(hf: Any) -> ModelSpec:
    return with_vision(hf, qwen3, _UNDER_MODEL, {"visual": Tower(_qwen3, "model.visual")})


def qwen3_5_vl(hf: Any) -> ModelSpec:
    return with_vision(hf, qwen3_5, _UNDER_MODEL, {"visual": Tower(_qwen3_5, "model.visual")})


def _qwen2_5(hf: Any) -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return Qwen2_5_VisionTransformerPretrainedModel._from_config(hf.vision_config)


def _qwen3(hf: Any) -> nn.Module:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    return Qwen3VLVisionModel._from_config(hf.vision_config)


def _qwen3_5(hf: Any) -> nn.Module:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

    return Qwen3_5VisionModel._from_config(hf.vision_config)
