"""Mixtures of experts."""

from families.family import Family
from mbridge_rl.core.layout import ParallelLayout

# Expert tensor parallelism 1: experts are whole on their ranks. Five experts would not divide; nine layers of experts would.
EXPERT_PARALLEL = ParallelLayout(tp=2, pp=2, ep=2, etp=1, stage_layers=(2, 1))

FAMILIES = [
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
        lora=("linear_qkv", "linear_proj"),
    ),
]
