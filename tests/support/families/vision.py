"""Language towers in Megatron, vision towers carried along."""

from families.family import DENSE, Family
from families.hybrid import (
    EXPERTS,
    GATED_DELTA_NET,
    GATED_DELTA_NET_ENGINE,
    MAMBA,
    MAMBA_LINEARS,
    RECURRENT_LINEARS,
    ROUTED_EXPERTS,
)
from mbridge_rl.core.layout import ParallelLayout

QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 72,
    "out_hidden_size": 96,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
SQUARE = {**QWEN_TOWER, "num_position_embeddings": 64}
# No images: vLLM builds the language model alone.
TEXT = {"language_model_only": True}

FAMILIES = [
    Family(
        "Qwen2.5-VL",
        "qwen2.5-vl",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **DENSE,
                "hidden_size": 128,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
            },
            "vision_config": {**QWEN_TOWER, "out_hidden_size": 128, "window_size": 16, "fullatt_block_indexes": [1]},
            "tie_word_embeddings": True,
        },
        base={},
        engine=TEXT,
    ),
    Family(
        "Qwen3-VL",
        "qwen3-vl",
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**DENSE, "head_dim": 32},
            "vision_config": {**SQUARE, "deepstack_visual_indexes": [0, 1]},
        },
        base={},
        engine=TEXT,
    ),
    Family(
        "Qwen3.5",
        "qwen3.5-vl",
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {"text_config": {**DENSE, **GATED_DELTA_NET}, "vision_config": SQUARE},
        base={},
        layout=ParallelLayout(tp=2, pp=2, stage_layers=(1, 3)),
        engine={**GATED_DELTA_NET_ENGINE, **TEXT},
        lora=MAMBA_LINEARS,
    ),
    Family(
        "Qwen3-VL-MoE",
        "qwen3-vl-moe",
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {**DENSE, **ROUTED_EXPERTS, "head_dim": 32, "mlp_only_layers": [1], "norm_topk_prob": True},
            "vision_config": {**SQUARE, "deepstack_visual_indexes": [0, 1]},
        },
        base={},
        layout=ParallelLayout(tp=2, pp=2, ep=2, etp=1, stage_layers=(2, 1)),
        engine=TEXT,
        lora=("linear_qkv", "linear_proj"),
    ),
    Family(
        "Qwen3.5-MoE",
        "qwen3.5-moe-vl",
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config": {**DENSE, **GATED_DELTA_NET, **EXPERTS}, "vision_config": SQUARE},
        base={},
        layout=ParallelLayout(tp=2, ep=2, etp=1),
        engine={**GATED_DELTA_NET_ENGINE, **TEXT},
        lora=RECURRENT_LINEARS,
    ),
    Family(
        "Gemma 3-VL",
        "gemma3-vl",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**DENSE, "head_dim": 32, "sliding_window": 5, "query_pre_attn_scalar": 20},
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 72,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "vision_use_head": False,
            },
        },
        base={},
        engine=TEXT,
        embedding=0.1,
    ),
    Family(
        "Nemotron-3 Nano Omni, language tower",
        "nemotron-omni",
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        {
            "text_config": {**DENSE, **MAMBA, "layers_block_type": ["linear_attention", "mlp", "full_attention"]},
            "vision_config": {
                "hidden_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "max_img_size": 64,
                "video_temporal_patch_size": 2,
            },
            "projector_hidden_size": 40,
            "vision_hidden_size": 64,
        },
        base={},
        engine="vLLM reads fields of the checkpoints' own config that Transformers' class does not write (vision_config.args)",
        lora=MAMBA_LINEARS,
        ignored=("vision_model.", "vision_final_layernorm.", "mlp1."),
        since=(5, 18),
    ),
]
