"""The tool that makes published configs small keeps what decides how a model is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from published import shrink as tool
from published.shrink import LENGTH, VOCABULARY, shrink

from mbridge_rl.hf.config import parse_config

GEMMA = {  # google/gemma-3-1b-it, as published but for fields that nothing here looks at
    "architectures": ["Gemma3ForCausalLM"],
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
R1 = {  # deepseek-ai/DeepSeek-R1, likewise
    "architectures": ["DeepseekV3ForCausalLM"],
    "eos_token_id": 128001,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {"beta_fast": 32, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"},
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def small(published: dict[str, Any]) -> dict[str, Any]:
    return shrink(published, parse_config(published))


def test_windows_heads_and_kinds_of_layers_stay() -> None:
    shrunk = small(GEMMA)
    assert parse_config(shrunk).layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert shrunk["sliding_window"] == LENGTH
    assert shrunk["max_position_embeddings"] == LENGTH * 32768 // 512
    assert shrunk["num_attention_heads"] // shrunk["num_key_value_heads"] == 4
    assert shrunk["head_dim"] * shrunk["num_attention_heads"] != shrunk["hidden_size"]
    assert shrunk["vocab_size"] == VOCABULARY
    assert shrunk["eos_token_id"] == [1, 106]
    unchanged = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq", "hidden_activation", "query_pre_attn_scalar")
    assert all(shrunk[name] == GEMMA[name] for name in unchanged)


def test_experts_groups_and_dense_layers_stay() -> None:
    shrunk = small(R1)
    unchanged = ("first_k_dense_replace", "n_group", "topk_group", "num_experts_per_tok", "num_nextn_predict_layers")
    assert all(shrunk[name] == R1[name] for name in unchanged)
    assert shrunk["num_hidden_layers"] > shrunk["first_k_dense_replace"]
    assert shrunk["n_routed_experts"] % shrunk["n_group"] == 0
    assert shrunk["n_routed_experts"] // shrunk["n_group"] * shrunk["topk_group"] > shrunk["num_experts_per_tok"]
    assert shrunk["rope_scaling"] == {**R1["rope_scaling"], "original_max_position_embeddings": LENGTH}
    assert shrunk["eos_token_id"] == VOCABULARY - 1
    assert shrunk["qk_rope_head_dim"] * 2 == shrunk["qk_nope_head_dim"]


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA))
    command = [sys.executable, tool.__file__, str(tmp_path / "config.json")]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(completed.stdout) == small(GEMMA)
