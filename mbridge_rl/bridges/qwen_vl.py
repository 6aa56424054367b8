"""Qwen2.5-VL, Qwen3-VL and Qwen3.5 with vision. A text token's three rotary coordinates are all the same, so that the language
models rotate as their text-only relatives do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.vision import Tower, with_vision
from mbridge_rl.bridges.qwen2 import qwen2
from mbridge_rl.bridges.qwen3 import qwen3
from mbridge_rl.bridges.qwen3_5 import qwen3_5, qwen3_5_moe
from mbridge_rl.bridges.qwen3_moe import qwen3_moe
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.stacked_experts import with_stacked_experts

_UNDER_MODEL = {"model.": "model.language_model."}


def qwen2_5_vl(hf: ConfigReader) -> ModelSpec:
    return with_vision(hf, qwen2, {}, {"visual": Tower(_qwen2_5, "visual")})


def qwen3_vl(hf: ConfigReader) -> ModelSpec:
    return with_vision(hf, qwen3, _UNDER_MODEL, {"visual": Tower(_qwen3, "model.visual")})


def qwen3_5_vl(hf: ConfigReader) -> ModelSpec:
    return with_vision(hf, qwen3_5, _UNDER_MODEL, {"visual": Tower(_qwen3_5, "model.visual")})


def qwen3_vl_moe(hf: ConfigReader) -> ModelSpec:
    """The spec of Qwen3-VL with experts. They are stacked, and in checkpoints on the hub transposed compared with those that
    Transformers saves."""
    spec = with_vision(hf, _normalizing_qwen3_moe, _UNDER_MODEL, {"visual": Tower(_qwen3_moe, "model.visual")})
    return replace(with_stacked_experts(spec, transposed=True), alternatives=(with_stacked_experts(spec),))


def _normalizing_qwen3_moe(text: ConfigReader) -> ModelSpec:
    """The language model; this family's routers always normalise."""
    text.require("norm_topk_prob", True)
    return qwen3_moe(text.with_values(norm_topk_prob=True))


def qwen3_5_moe_vl(hf: ConfigReader) -> ModelSpec:
    return with_vision(hf, qwen3_5_moe, _UNDER_MODEL, {"visual": Tower(_qwen3_5_moe, "model.visual")})


def _qwen2_5(hf: Any) -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return Qwen2_5_VisionTransformerPretrainedModel._from_config(hf.vision_config)


def _qwen3(hf: Any) -> nn.Module:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    return Qwen3VLVisionModel._from_config(hf.vision_config)


def _qwen3_moe(hf: Any) -> nn.Module:
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

    return Qwen3VLMoeVisionModel._from_config(hf.vision_config)


def _qwen3_5(hf: Any) -> nn.Module:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel

    return Qwen3_5VisionModel._from_config(hf.vision_config)


def _qwen3_5_moe(hf: Any) -> nn.Module:
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel

    return Qwen3_5MoeVisionModel._from_config(hf.vision_config)
