"""Builds Megatron's two decoder classes, each with the layers that a config describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mbridge_rl.core.extras import Extra
from mbridge_rl.megatron.layer_specs import change_layer_specs
from mbridge_rl.megatron.prediction import predicting_model
from mbridge_rl.megatron.versions.hybrid import model_of_stack, stack_spec
from mbridge_rl.megatron.versions.layer_specs import keep_query_projection


def decoder_model(arguments: Mapping[str, Any], extras: Sequence[Extra], vp_stage: int | None) -> nn.Module:
    """A `GPTModel`: attention (or, in some layers, linear attention) and an MLP or experts in every layer, with the changes by
    those `extras` that change layer specs."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec

    config = arguments["config"]
    if config.heterogeneous_block_specs:
        layers = get_gpt_heterogeneous_layer_spec(config, use_te=True, vp_stage=vp_stage)
    elif config.experimental_attention_variant is None:
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    else:
        layers = get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage)
    keep_query_projection(layers.layer_specs, config)
    change_layer_specs(layers.layer_specs, extras)
    if config.mtp_num_layers is None:
        model = GPTModel(transformer_layer_spec=layers, vp_stage=vp_stage, **arguments)
    else:
        model = predicting_model(layers, extras, vp_stage, arguments)
    if config.attention_output_gate and config.num_query_groups < config.tensor_model_parallel_size:
        _select_own_gates(model)
    return model


def _select_own_gates(model: nn.Module) -> None:
    """Makes every rank use its own gates where several ranks share a KV head. Megatron then computes all gates of the head's
    group on each of these ranks; it selects every rank's own queries, but not its own gates."""
    from megatron.core.transformer.attention import SelfAttention

    def with_selection(original: Callable[..., tuple[Tensor, ...]], attention: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
        def with_own_gates(*args: Any, **options: Any) -> tuple[Tensor, ...]:
            query, key, value, gate = original(*args, **options)
            heads, group = query.shape[2], attention.pg_collection.tp
            first = group.rank() * heads % gate.shape[2]
            return query, key, value, gate[:, :, first : first + heads]

        return with_own_gates

    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.get_query_key_value_tensors = with_selection(module.get_query_key_value_tensors, module)


def hybrid_model(arguments: Mapping[str, Any], pattern: str) -> nn.Module:
    """Megatron's model of Mamba and attention layers: one module per layer, of the kind that the layer's letter in `pattern`
    names."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    config, spec = arguments["config"], stack_spec()
    layers = spec.submodules
    if config.num_moe_experts:
        experts = get_moe_module_spec(use_te=True, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
        submodules = replace(layers.moe_layer.submodules, mlp=experts)
        layers = replace(layers, moe_layer=replace(layers.moe_layer, submodules=submodules))
    return model_of_stack(replace(spec, submodules=layers), pattern, dict(arguments))
