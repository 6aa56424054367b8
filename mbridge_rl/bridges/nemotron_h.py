"""Nemotron-H, Nemotron Nano v2 and Nemotron-3 Nano and Super: every layer is one of Mamba-2, attention, MLP or experts.

Attention has no positions. Transformers bounds Mamba's time step by `time_step_min` from below; vLLM, Megatron and the models'
own code do not (`core.extras.TimeStepMinimum`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, MEGATRON_LAYER, Block, activation, attention, plain_mlp
from mbridge_rl.bridges.blocks.experts import ExpertNames, gated_experts, shared_experts
from mbridge_rl.bridges.blocks.mamba import MambaSizes, mamba
from mbridge_rl.bridges.blocks.versions import EMBEDDING_OF_OLDER_RELEASES
from mbridge_rl.bridges.blocks.vision import language_config, text_only
from mbridge_rl.core.extras import Routing, TimeStepMinimum
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import column_parallel, replicated, vocabulary_parallel

_LAYER = "backbone.layers.{layer}"
_TOWERS = ("vision_model.", "vision_projector.", "vision_final_layernorm.", "mlp1.", "sound_encoder.", "sound_projection.")
_NORM, _MIXER = f"{_LAYER}.norm.weight", f"{_LAYER}.mixer"


# Megatron's letters for the kinds of layers, by Transformers' names.
_LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
_WITHOUT_EFFECT = (
    "num_hidden_layers expand chunk_size use_mamba_kernels mamba_ssm_cache_dtype moe_shared_expert_overlap "
    "time_step_max time_step_floor time_step_limit num_nextn_predict_layers mtp_layers_block_type"
)
_TOWER_FIELDS = (
    "vision_config audio_config force_image_size downsample_ratio projector_hidden_size vision_hidden_size video_pruning_rate "
    "video_temporal_patch_size"
)
_EXPERT_FIELDS = (
    "n_routed_experts n_shared_experts moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size "
    "num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob"
)


def nemotron_h(hf: ConfigReader) -> ModelSpec:
    hf.ignore(*_WITHOUT_EFFECT.split())
    for name, expected in {
        "tie_word_embeddings": False,
        "use_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "residual_in_fp32": False,
        "sliding_window": None,
    }.items():
        hf.require(name, expected)
    h, pattern = hf.hidden_size, _pattern(hf)
    # Blocks of other families need the number of layers, and no `layer_types`, in which they would look for windows.
    hf = hf.with_values(num_hidden_layers=len(pattern), layer_types=None)
    if "M" not in pattern:
        hf.ignore("time_step_min")
    if "E" not in pattern:
        hf.ignore(*_EXPERT_FIELDS.split())
    kinds = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}
    layers = {kind: tuple(layer for layer, letter in enumerate(pattern) if letter == kind) for kind in kinds}
    blocks = [block.only_in(layers[kind]) for kind, build in kinds.items() if layers[kind] for block in build(hf)]
    rules = (
        vocabulary_parallel(
            "embedding.word_embeddings.weight", "backbone.embeddings.weight", (hf.vocab_size, h), placement="first_stage"
        ),
        *(rule for block in blocks for rule in block.rules),
        replicated("decoder.final_norm.weight", "backbone.norm_f.weight", (h,), placement="last_stage"),
        vocabulary_parallel("output_layer.weight", "lm_head.weight", (hf.vocab_size, h), placement="last_stage"),
    )
    config: dict[str, Any] = {
        "num_layers": len(pattern),
        "hidden_size": h,
        "num_attention_heads": hf.num_attention_heads,
        "ffn_hidden_size": hf.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.layer_norm_epsilon,
        "activation_func": activation(hf),
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "init_method_std": hf.initializer_range,
    }
    for block in blocks:
        config.update(block.config)
    spec = ModelSpec(
        architecture=hf.architecture,
        num_layers=len(pattern),
        vocab_size=hf.vocab_size,
        tied_embeddings=False,
        transformer_config=config,
        gpt_model={"max_sequence_length": hf.max_position_embeddings, "position_embedding_type": "none"},
        rules=rules,
        num_experts=next((block.num_experts for block in blocks if block.num_experts), None),
        hybrid_pattern=pattern,
        extras=tuple(extra for block in blocks for extra in block.extras),
        ignored_hf_prefixes=("mtp.",),
    )
    # Older releases of Transformers save the embedding under another name than the one of the hub's checkpoints.
    return replace(spec, alternatives=(spec.renamed({"backbone.embeddings.": EMBEDDING_OF_OLDER_RELEASES}),))


def _pattern(hf: ConfigReader) -> str:
    kinds = hf.layers_block_type
    if not kinds or set(kinds) - _LETTERS.keys():
        raise hf.refuse("layers_block_type", f"{kinds} is not supported; supported are layers of {', '.join(_LETTERS)}")
    return "".join(_LETTERS[kind] for kind in kinds)


def nemotron_h_omni(hf: ConfigReader) -> ModelSpec:
    """The language model of Nemotron-3 Nano Omni. Its towers for images and sound are ignored: an export has none of their
    tensors."""
    hf.ignore(*_TOWER_FIELDS.split())
    spec = nemotron_h(language_config(hf)).renamed({name: f"language_model.{name}" for name in ("backbone.", "lm_head.")})
    extras = (*spec.extras, text_only(hf))
    return replace(spec, extras=extras, ignored_hf_prefixes=(*spec.ignored_hf_prefixes, *_TOWERS), alternatives=())


def _mamba(hf: ConfigReader) -> list[Block]:
    # These values are fixed in Megatron's mixer.
    for name, expected in {
        "conv_kernel": 4,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "layer_norm_epsilon": 1e-5,
    }.items():
        hf.require(name, expected)
    hf.require("mamba_hidden_act", "silu")
    sizes = MambaSizes(hf.mamba_num_heads, hf.mamba_head_dim, hf.n_groups, hf.ssm_state_size, hf.conv_kernel)
    megatron_prefix, block = f"{MEGATRON_LAYER}.mixer", mamba(hf.hidden_size, sizes, f"{MEGATRON_LAYER}.mixer", _MIXER)
    norms = (
        replicated(f"{megatron_prefix}.in_proj.layer_norm_weight", _NORM, (hf.hidden_size,)),
        column_parallel(f"{megatron_prefix}.norm.weight", {f"{_MIXER}.norm.weight": sizes.heads * sizes.head_dim}),
    )
    minimum = (TimeStepMinimum(hf.time_step_min),) if hf.time_step_min > 0 else ()
    return [Block(block.config, (*norms, *block.rules), extras=minimum)]


def _attention(hf: ConfigReader) -> list[Block]:
    return [_with_family_names(attention(hf))]


def _mlp(hf: ConfigReader) -> list[Block]:
    return [_with_family_names(plain_mlp(hf))]


def _experts(hf: ConfigReader) -> list[Block]:
    """Experts without gates, in Nemotron-3 Super between projections to a smaller size, beside a shared expert that processes
    every token."""
    hf.require("n_shared_experts", 1)
    routing = Routing(
        "sigmoid",
        normalized=hf.norm_topk_prob,
        scaling_factor=hf.routed_scaling_factor,
        groups=hf.n_group or 1,
        chosen_groups=hf.topk_group or 1,
    )
    names, every = ExpertNames(gate=None), tuple(range(hf.num_hidden_layers))
    sizes = {"experts": hf.n_routed_experts, "ffn": hf.moe_intermediate_size, "latent": hf.moe_latent_size}
    routed = gated_experts(hf, every, routing, **sizes, names=names, bias_shape=(hf.n_routed_experts,), fp32_router=True)
    shared = shared_experts(hf, every, hf.moe_shared_expert_intermediate_size, names=names)
    return [_with_family_names(block) for block in (routed, shared, _latent_projections(hf))]


def _latent_projections(hf: ConfigReader) -> Block:
    latent, h = hf.moe_latent_size, hf.hidden_size
    if latent is None:
        return Block()
    shapes = {"fc1_latent_proj": (latent, h), "fc2_latent_proj": (h, latent)}
    rules = tuple(
        replicated(f"{MEGATRON_LAYER}.mlp.{name}.weight", f"{_MIXER}.{name}.weight", shape) for name, shape in shapes.items()
    )
    return Block({"moe_latent_size": latent}, rules)


def _with_family_names(block: Block) -> Block:
    return block.renamed(
        {
            f"{HF_LAYER}.self_attn": _MIXER,
            f"{HF_LAYER}.mlp": _MIXER,
            f"{HF_LAYER}.input_layernorm.weight": _NORM,
            f"{HF_LAYER}.post_attention_layernorm.weight": _NORM,
        }
    )
