"""Model families: each file defines how a Hugging Face config becomes a Megatron model, and which tensors correspond.

A new family needs one file here and one line in `FAMILIES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Literal

from mbridge_rl.bridges.blocks.config_reader import ConfigReader, reader_of, refuse_unread
from mbridge_rl.bridges.deepseek_v2 import deepseek_v2
from mbridge_rl.bridges.deepseek_v3 import deepseek_v3
from mbridge_rl.bridges.ernie4_5 import ernie4_5
from mbridge_rl.bridges.ernie4_5_moe import ernie4_5_moe
from mbridge_rl.bridges.exaone4 import exaone4
from mbridge_rl.bridges.falcon_h1 import falcon_h1
from mbridge_rl.bridges.gemma import gemma, gemma2, gemma3
from mbridge_rl.bridges.gemma3_vl import gemma3_vl
from mbridge_rl.bridges.glm4_moe import glm4_moe
from mbridge_rl.bridges.glm4_moe_lite import glm4_moe_lite
from mbridge_rl.bridges.gpt_oss import gpt_oss
from mbridge_rl.bridges.granite import granite
from mbridge_rl.bridges.llama import llama
from mbridge_rl.bridges.minimax_m2 import minimax_m2
from mbridge_rl.bridges.ministral3 import ministral3
from mbridge_rl.bridges.mistral import mistral
from mbridge_rl.bridges.mixtral import mixtral
from mbridge_rl.bridges.nemotron import nemotron
from mbridge_rl.bridges.nemotron_h import nemotron_h, nemotron_h_omni
from mbridge_rl.bridges.nemotron_nas import nemotron_nas
from mbridge_rl.bridges.olmo2 import olmo2
from mbridge_rl.bridges.olmoe import olmoe
from mbridge_rl.bridges.phi3 import phi3
from mbridge_rl.bridges.qwen2 import qwen2
from mbridge_rl.bridges.qwen2_moe import qwen2_moe
from mbridge_rl.bridges.qwen3 import qwen3
from mbridge_rl.bridges.qwen3_5 import qwen3_5, qwen3_5_moe
from mbridge_rl.bridges.qwen3_moe import qwen3_moe
from mbridge_rl.bridges.qwen3_next import qwen3_next
from mbridge_rl.bridges.qwen_vl import qwen2_5_vl, qwen3_5_moe_vl, qwen3_5_vl, qwen3_vl, qwen3_vl_moe
from mbridge_rl.bridges.seed_oss import seed_oss
from mbridge_rl.bridges.unsupported import UNSUPPORTED
from mbridge_rl.core.errors import CheckpointError, UnsupportedModelError
from mbridge_rl.core.model import ModelSpec

FAMILIES: dict[str, Callable[[ConfigReader], ModelSpec]] = {
    "LlamaForCausalLM": llama,
    "DeciLMForCausalLM": nemotron_nas,
    "MistralForCausalLM": mistral,
    "MinistralForCausalLM": mistral,
    "Ministral3ForCausalLM": ministral3,
    "Phi3ForCausalLM": phi3,
    "SeedOssForCausalLM": seed_oss,
    "GraniteForCausalLM": granite,
    "Ernie4_5ForCausalLM": ernie4_5,
    "NemotronForCausalLM": nemotron,
    "GemmaForCausalLM": gemma,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Exaone4ForCausalLM": exaone4,
    "Olmo2ForCausalLM": olmo2,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "NemotronHForCausalLM": nemotron_h,
    "NemotronH_Omni_Reasoning_V3": nemotron_h_omni,
    "Qwen3NextForCausalLM": qwen3_next,
    "Qwen3_5ForCausalLM": qwen3_5,
    "Qwen3_5MoeForCausalLM": qwen3_5_moe,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl_moe,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5_moe_vl,
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "FalconH1ForCausalLM": falcon_h1,
    "Qwen3_5ForConditionalGeneration": qwen3_5_vl,
    "Gemma3ForConditionalGeneration": gemma3_vl,
    "DeepseekV2ForCausalLM": deepseek_v2,
    "Ernie4_5_MoeForCausalLM": ernie4_5_moe,
    "Glm4MoeForCausalLM": glm4_moe,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite,
    "GptOssForCausalLM": gpt_oss,
    "MiniMaxM2ForCausalLM": minimax_m2,
    "MixtralForCausalLM": mixtral,
    "OlmoeForCausalLM": olmoe,
    "Qwen2MoeForCausalLM": qwen2_moe,
}


# Whose arithmetic a model follows where Transformers and vLLM differ.
Numerics = Literal["transformers", "vllm"]


def model_spec(hf_config: Any, *, mtp: bool = False, numerics: Numerics = "transformers") -> ModelSpec:
    """The spec of the model that `hf_config` (a Transformers config) describes, with its multi-token-prediction layers (`mtp`)
    or without.

    Args:
        numerics: whose arithmetic it follows where Transformers and vLLM differ (`core.extras.NotInVllm`).

    Raises:
        UnsupportedModelError: there is no bridge for the architecture, or its bridge does not support a feature in the config.
        CheckpointError: a field of the config has an impossible value; the message has its name, its value and the allowed
            values.
    """
    architectures = getattr(hf_config, "architectures", None) or []
    if not isinstance(architectures, list | tuple) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(
            f"architectures={architectures!r} in the config; expected a list with the name of a model's class"
        )
    if not architectures:
        raise UnsupportedModelError(f"the config names no architecture; set architectures to one of {', '.join(FAMILIES)}")
    if reason := UNSUPPORTED.get(architectures[0]):
        raise UnsupportedModelError(f"{architectures[0]} is not supported: {reason}")
    family = FAMILIES.get(architectures[0])
    if family is None:
        nearest = difflib.get_close_matches(architectures[0], FAMILIES, n=1, cutoff=0.3)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise UnsupportedModelError(f"no bridge for {architectures[0]}; supported: {', '.join(FAMILIES)}{hint}")
    reader = reader_of(hf_config, architectures[0])
    spec = family(reader)
    refuse_unread(reader)
    if numerics == "vllm":
        spec = spec.as_in_vllm()
    if not mtp:
        return spec
    if spec.prediction is None:
        raise UnsupportedModelError(
            f"mtp=True: {architectures[0]} has no multi-token-prediction layers by its config (num_nextn_predict_layers), or "
            "none that its bridge maps; use mtp=False"
        )
    return spec.prediction
