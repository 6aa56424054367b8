"""Dense decoders."""

from typing import Any

from families.family import Family
from families.heterogeneous import DeciLMForCausalLM
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.hf.nemotron_nas import NemotronNasConfig

LLAMA = "Llama 2, 3, 3.1, 3.2, 3.3"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# LongRoPE of 16-channel rotations; the test's tokens are longer than 16, the engine's are not.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [1.0 + i for i in range(12)],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.75,
}


def block(group: int | None, ffn_mult: float | None) -> dict[str, dict[str, Any]]:
    """A layer of Llama-Nemotron: query heads per KV head and relative size of the MLP; `None` where there is none."""
    return {
        "attention": {"no_op": group is None, "n_heads_in_group": group, "replace_with_linear": False},
        "ffn": {"no_op": ffn_mult is None, "ffn_mult": ffn_mult, "replace_with_linear": False},
    }


TP4 = ParallelLayout(tp=4, pp=2, stage_layers=(1, 2))  # more ranks than KV heads

FAMILIES = [
    Family(LLAMA, "llama", "llama", "LlamaForCausalLM", {"head_dim": 32}),
    Family(
        LLAMA,
        "llama3-tied",
        "llama",
        "LlamaForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4},
    ),
    Family(LLAMA, "llama-biases", "llama", "LlamaForCausalLM", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    Family(
        "Llama-Nemotron (DeciLM)",
        "nemotron-nas",
        "nemotron-nas",
        "DeciLMForCausalLM",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "block_configs": [block(2, 2.0), block(None, 6.0), block(4, None), block(1, 2.0)],
            "rope_parameters": LLAMA3_ROPE,
            "auto_map": {"AutoConfig": "configuration_decilm.NemotronNasConfig"},
        },
        layout=ParallelLayout(tp=2, pp=2, stage_layers=(1, 3)),
        engine={"trust_remote_code": True},
        classes=(NemotronNasConfig, DeciLMForCausalLM),
        files={"configuration_decilm.py": "from mbridge_rl.hf.nemotron_nas import NemotronNasConfig\n"},
    ),
    Family("Mistral", "mistral", "mistral", "MistralForCausalLM", {"head_dim": 32, "sliding_window": 7}, layout=TP4),
    Family(
        "Mistral",
        "ministral-8b",
        "ministral",
        "MinistralForCausalLM",
        {"head_dim": 32, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    Family("Phi-3, Phi-3.5, Phi-4", "phi3", "phi3", "Phi3ForCausalLM", {"hidden_size": 128, "sliding_window": 7}, layout=TP4),
    Family(
        "Phi-3, Phi-3.5, Phi-4",
        "phi3-longrope",
        "phi3",
        "Phi3ForCausalLM",
        {
            "hidden_size": 128,
            "rope_parameters": LONG_ROPE,
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
        },
        engine={"max_model_len": 16},
    ),
    Family("Seed-OSS", "seed-oss", "seed_oss", "SeedOssForCausalLM", {"head_dim": 32}),
    Family(
        "Granite",
        "granite",
        "granite",
        "GraniteForCausalLM",
        {
            "hidden_size": 128,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
            "mlp_bias": True,
        },
        embedding=0.1,
    ),
    Family("ERNIE 4.5, dense", "ernie4.5", "ernie4_5", "Ernie4_5ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    Family(
        "ERNIE 4.5, dense",
        "ernie4.5-biases",
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        {"head_dim": 32, "use_bias": True},
        engine="vLLM 0.32 builds ERNIE 4.5 without biases: the engine's loader ignores them",
    ),
    Family("Nemotron", "nemotron", "nemotron", "NemotronForCausalLM", {"head_dim": 32}),
    Family(
        "Gemma",
        "gemma",
        "gemma",
        "GemmaForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 1},
        embedding=0.1,
    ),
    Family(
        "Gemma 2",
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        embedding=0.1,
    ),
    Family(
        "Gemma 3 (text)",
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "num_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            },
        },
        embedding=0.1,
    ),
    Family(
        "EXAONE 4",
        "exaone4",
        "exaone4",
        "Exaone4ForCausalLM",
        {
            "hidden_size": 128,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    Family(
        "EXAONE 4",
        "exaone4-full",
        "exaone4",
        "Exaone4ForCausalLM",
        {"hidden_size": 128, "sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
    ),
    Family("OLMo 2", "olmo2", "olmo2", "Olmo2ForCausalLM", {"hidden_size": 128}),
    Family(
        "Ministral 3 (text)",
        "ministral3",
        "ministral3",
        "Ministral3ForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    Family("Qwen2, Qwen2.5", "qwen2", "qwen2", "Qwen2ForCausalLM", {"hidden_size": 128}),
    Family("Qwen2, Qwen2.5", "qwen2-tied", "qwen2", "Qwen2ForCausalLM", {"hidden_size": 128, "tie_word_embeddings": True}),
    Family("Qwen3", "qwen3", "qwen3", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    Family("Qwen3", "qwen3-untied", "qwen3", "Qwen3ForCausalLM", {"head_dim": 32}, layout=TP4),
]
