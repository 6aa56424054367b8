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
RECURRENT_LINEARS = ("in_proj", "out_proj", "linear_qkv", "linear_proj")
MAMBA_LINEARS = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")

NO_UNGATED_EXPERTS = "vLLM has experts without gates on CUDA, XPU and ROCm only"
UNGATED_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 2.5,
}

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

ROUTED_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS = {**ROUTED_EXPERTS, "shared_expert_intermediate_size": 64}
EXPERT_PARALLEL = ParallelLayout(tp=2, pp=2, ep=2, etp=1, stage_layers=(3, 1))

FAMILIES = [
    Family(
        "Qwen3-Next",
        "qwen3-next",
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**GATED_DELTA_NET, **EXPERTS, "head_dim": 64, "mlp_only_layers": [1]},
        layout=EXPERT_PARALLEL,
        engine=GATED_DELTA_NET_ENGINE,
        lora=RECURRENT_LINEARS,
    ),
    Family(
        "Qwen3.5-MoE",
        "qwen3.5-moe",
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {**GATED_DELTA_NET, **EXPERTS, "num_experts": 3},
        layout=ParallelLayout(ep=3, etp=1, dp=3),
        engine=GATED_DELTA_NET_ENGINE,
        lora=RECURRENT_LINEARS,
    ),
    Family(
        "Qwen3.5",
        "qwen3.5",
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        # Fewer KV heads than ranks: these share its queries and gates.
        {**GATED_DELTA_NET, "num_key_value_heads": 1, "tie_word_embeddings": True},
        layout=ParallelLayout(tp=2, pp=2, stage_layers=(3, 1)),
        engine=GATED_DELTA_NET_ENGINE,
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
        right_since=(5, 15),  # before, its scan over a sequence is another
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
    Family(
        "Nemotron-3 Nano",
        "nemotron-3-nano",
        "nemotron_h",
        "NemotronHForCausalLM",
        {**MAMBA, **UNGATED_EXPERTS, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"]},
        layout=ParallelLayout(tp=2, pp=2, ep=2, etp=1, stage_layers=(3, 2)),
        engine=NO_UNGATED_EXPERTS,
        lora=RECURRENT_LINEARS,
        right_since=(5, 15),  # as above
    ),
    Family(
        "Nemotron-3 Super",
        "nemotron-3-super",
        "nemotron_h",
        "NemotronHForCausalLM",
        # Two of four groups of experts, and experts smaller than the model.
        {
            **MAMBA,
            **UNGATED_EXPERTS,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_latent_size": 64,
            "layers_block_type": ["moe", "linear_attention", "full_attention"],
        },
        layout=ParallelLayout(tp=2, ep=2, etp=1),
        engine=NO_UNGATED_EXPERTS,
        lora=RECURRENT_LINEARS,
        right_since=(5, 15),  # as above
    ),
]
