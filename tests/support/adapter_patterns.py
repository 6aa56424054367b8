"""Which linears adapters are put on in tests, and how far rounding may take logits."""

from __future__ import annotations

from typing import Any

import deepseek_models
from tiny import DENSE
from tolerance import forward

from mbridge_rl.core.lora_config import LoRAConfig

LATENT = ("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj")
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# PEFT takes dense `gate_proj` of models with experts for the experts' own
BUT_DENSE = ("linear_qkv", "linear_proj", "*.experts.*")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = LoRAConfig(rank=3, alpha=6.0)
# In PEFT's words: by last name, by layer, and one linear of one layer. `peft` sorts them when it saves.
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r".*\.2\.mlp\.down_proj": 4, "down_proj": 5, r".*layers\.1\.self_attn\.[qkv]_proj": 2},
    "alpha_pattern": {"o_proj": 12.0, r"layers\.0\.mlp\.(gate|up)_proj": 1.5},
}
# Of the deepest of these models. W x + scale * B A x is one more sum of a stage.
ROUNDING = forward(deepseek_models.TINY["num_hidden_layers"], DENSE["intermediate_size"])
