"""Mixtures of experts."""

from families.family import Family
from mbridge_rl.core.layout import ParallelLayout

# Expert tensor parallelism 1: experts are whole on their ranks. Odd numbers of them take EP 3.
EXPERT_PARALLEL = ParallelLayout(tp=2, pp=2, ep=2, etp=1, stage_layers=(2, 1))

# Six ranks are one too many for a quick test: three experts parallel, one stage.
THREE_WAYS = ParallelLayout(tp=1, ep=3, etp=1, dp=3)
ATTENTION = ("linear_qkv", "linear_proj")
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
# vLLM's rotary kernel for the CPU is wrong for latent attention; its attention for processors with AMX has no fp32.
LATENT_ENGINE = {
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    "attention_backend": "CPU_MLA",
}
LATENT_LORA = ("linear_kv_up_proj", "linear_proj")
SIGMOID = {
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
# What config.json of the released checkpoints says and vLLM reads, though Transformers does not.
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
}
GPT_OSS = {
    "hidden_size": 128,
    "head_dim": 32,
    "num_key_value_heads": 1,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "sliding_window": 8,
    "rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None, "truncate": False},
}

FAMILIES = [
    Family(
        "Mixtral",
        "mixtral",
        "mixtral",
        "MixtralForCausalLM",
        {"head_dim": 32, "num_local_experts": 3, "intermediate_size": 96, "rms_norm_eps": 1e-6},
        layout=THREE_WAYS,
        lora=ATTENTION,
    ),
    Family(
        "Qwen2-MoE",
        "qwen2-moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            "hidden_size": 128,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 96,
            "mlp_only_layers": [0],
        },
        layout=EXPERT_PARALLEL,
        lora=ATTENTION,
    ),
    Family(
        "Qwen3-MoE",
        "qwen3-moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
        },
        layout=EXPERT_PARALLEL,
        lora=ATTENTION,
    ),
    Family(
        "OLMoE",
        "olmoe",
        "olmoe",
        "OlmoeForCausalLM",
        # Fewer KV heads than tensor-parallel ranks: the norm's ranks hold copies of the same head.
        {"hidden_size": 128, "num_key_value_heads": 1, "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64},
        layout=EXPERT_PARALLEL,
        lora=ATTENTION,
    ),
    Family(
        "DeepSeek V2, V2-Lite",
        "deepseek-v2-lite",
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            **LATENT,
            **SIGMOID,
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "rope_parameters": YARN,
        },
        layout=EXPERT_PARALLEL,
        engine=LATENT_ENGINE,
        lora=LATENT_LORA,
        right_since=(5, 15),  # before, attention leaves out the factor that YaRN gives its scale
    ),
    Family(
        "DeepSeek V2, V2-Lite",
        "deepseek-v2",
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {
            **LATENT,
            **SIGMOID,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "n_group": 3,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
        layout=EXPERT_PARALLEL,
        engine=LATENT_ENGINE,
        lora=LATENT_LORA,
        right_since=(5, 15),  # before, as for the variant above
    ),
    Family(
        "DeepSeek V3, R1",
        "deepseek-v3",
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {**LATENT, **SIGMOID, **NOAUX, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "rope_parameters": YARN},
        layout=EXPERT_PARALLEL,
        engine=LATENT_ENGINE,
        lora=LATENT_LORA,
    ),
    Family(
        "Moonlight",
        "moonlight",
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            **SIGMOID,
            **NOAUX,
            "q_lora_rank": None,
            "n_routed_experts": 5,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": 1e-5,
        },
        layout=ParallelLayout(tp=2, pp=2, stage_layers=(2, 1)),
        engine=LATENT_ENGINE,
        lora=LATENT_LORA,
    ),
    Family(
        "Kimi-K2",
        "kimi-k2",
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            **SIGMOID,
            **NOAUX,
            "n_routed_experts": 9,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**YARN, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        layout=THREE_WAYS,
        engine=LATENT_ENGINE,
        lora=LATENT_LORA,
    ),
    Family(
        "GLM-4.5, 4.6, 4.7",
        "glm-4.5",
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**SIGMOID, "head_dim": 32, "attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 1},
        layout=EXPERT_PARALLEL,
        lora=ATTENTION,
    ),
    Family(
        "GLM-4.5-Air",
        "glm-4.5-air",
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**SIGMOID, "head_dim": 32, "attention_bias": True, "n_routed_experts": 5, "first_k_dense_replace": 2},
        layout=ParallelLayout(tp=2, pp=2, ep=1, etp=2, stage_layers=(1, 2)),
        lora=ATTENTION,
    ),
    Family(
        "GLM-4.7-Flash",
        "glm-4.7-flash",
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        {**LATENT, **SIGMOID, "mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 1},  # for vLLM
        layout=EXPERT_PARALLEL,
        engine=LATENT_ENGINE,
        lora=LATENT_LORA,
    ),
    Family(
        "MiniMax-M2",
        "minimax-m2",
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {
            "head_dim": 32,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "rotary_dim": 16,
            "use_qk_norm": True,
            "use_routing_bias": True,
            "scoring_func": "sigmoid",
        },
        layout=EXPERT_PARALLEL,
        lora=ATTENTION,
    ),
    Family(
        "ERNIE 4.5 (MoE)",
        "ernie-4.5-moe",
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {
            "hidden_size": 128,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "tie_word_embeddings": True,
        },
        layout=EXPERT_PARALLEL,
        lora=ATTENTION,
    ),
    Family("GPT-OSS", "gpt-oss", "gpt_oss", "GptOssForCausalLM", GPT_OSS, layout=EXPERT_PARALLEL, lora=ATTENTION),
    Family(
        "GPT-OSS",
        "gpt-oss-clamped",
        "gpt_oss",
        "GptOssForCausalLM",
        # So small that both halves of the activation are clamped.
        {**GPT_OSS, "num_local_experts": 3, "swiglu_alpha": 1.5, "swiglu_limit": 0.5},
        layout=THREE_WAYS,
        engine="vLLM's kernel for CPUs has the alpha and the limit of the released models built in",
        lora=ATTENTION,
        since=(5, 19),  # before, Transformers' model had both numbers built in, too
    ),
]
