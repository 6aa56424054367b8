"""Linear attention and Mamba beside attention."""

from families.family import Family
from mbridge_rl.core.layout import ParallelLayout

UNEVEN = ParallelLayout(tp=2, pp=2, stage_layers=(3, 2))

# The state of one request is small on its own: pages of the KV cache take a whole prompt.
MAMBA = {
    "head_dim": 32,
    "ssm_state_size": 16,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "n_groups": 4,
    "chunk_size": 8,
}
# vLLM caches prefixes of recurrent states only together with chunked prefill.
NO_PREFIX_CACHE = {"enable_prefix_caching": False}
MAMBA_LINEARS = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

# Three layers of linear attention, then one of attention.
GATED_DELTA_NET = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
# vLLM's kernel for a CPU has heads of 128 and bfloat16.
GATED_DELTA_NET_ENGINE = {**NO_PREFIX_CACHE, "dtype": "bfloat16"}

FAMILIES = [
    Family(
        "Qwen3.5",
        "qwen3.5",
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        # Fewer KV heads than ranks: these share its queries and gates.
        {**GATED_DELTA_NET, "num_key_value_heads": 1, "tie_word_embeddings": True},
        layout=ParallelLayout(tp=2, pp=2, stage_layers=(3, 1)),
        engine="vLLM's module for it imports torchvision, of which no build fits a CPU build of torch",
        lora=MAMBA_LINEARS,
    ),
    Family(
        "Nemotron-H, Nemotron Nano v2",
        "nemotron-h",
        "nemotron_h",
        "NemotronHForCausalLM",
        {**MAMBA, "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]},
        layout=UNEVEN,
        engine=NO_PREFIX_CACHE,
        lora=MAMBA_LINEARS,
    ),
    Family(
        "Falcon-H1",
        "falcon-h1",
        "falcon_h1",
        "FalconH1ForCausalLM",
        {
            "hidden_size": 128,
            "mamba_d_ssm": 96,
            "mamba_n_heads": 12,
            "mamba_d_head": 8,
            "mamba_n_groups": 4,
            "mamba_d_state": 16,
            "mamba_chunk_size": 8,
            "mamba_rms_norm": False,
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 1.5,
            "mlp_multipliers": [0.8, 0.7],
            "key_multiplier": 0.6,
            "attention_in_multiplier": 1.1,
            "attention_out_multiplier": 0.9,
            "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.75,
        },
        engine=NO_PREFIX_CACHE,
        lora=MAMBA_LINEARS,
    ),
]
