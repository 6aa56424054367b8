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

FAMILIES = [
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
]
