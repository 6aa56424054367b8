"""Adds a spec's extras to the modules that Megatron built: hooks and small modules, one function per kind.

Hooks act inside of Megatron's own forward pass, so schedules, recomputation and every parallel axis work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.extras import (
    AttentionSoftcap,
    EmbeddingScale,
    Extra,
    LatentNormEpsilon,
    LogitScale,
    LogitSoftcap,
    MlpScale,
    OutputNorms,
    PlainNorm,
    ProjectionNorm,
    QueryScaleByPosition,
    ResidualScale,
    RotaryFrequencies,
    RotaryFrequenciesByLayer,
    RotaryFrequenciesByLength,
    RotaryScale,
    Routing,
    TextOnly,
    TimeStepMinimum,
)
from mbridge_rl.megatron.context_parallel import token_positions
from mbridge_rl.megatron.parallel_mixers import bound_time_steps
from mbridge_rl.megatron.projection_norm import normalize_projections
from mbridge_rl.megatron.rotary import RotaryByLayer, RotaryByLength, with_frequencies
from mbridge_rl.megatron.routing import replace_routing


def add_extras(model: nn.Module, extras: Sequence[Extra]) -> None:
    """Adds the extras to one chunk, before it is wrapped and before weights are loaded. Extras for modules that the chunk lacks
    (an intermediate pipeline stage has no embedding) are skipped, and so are extras that have changed the layer specs."""
    for extra in extras:
        if add := _ADD.get(type(extra)):
            add(model, extra)


def _scale_embeddings(model: nn.Module, extra: EmbeddingScale) -> None:
    def scaled(_: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
        return embeddings * torch.tensor(extra.factor, dtype=embeddings.dtype)

    if hasattr(model, "embedding"):
        model.embedding.register_forward_hook(scaled)


def logit_changes(extras: Sequence[Extra]) -> list[Callable[[Tensor], Tensor]]:
    """The changes of logits by the extras, in order. Each acts element by element, so that it does not depend on how the
    vocabulary or the tokens are divided."""
    return [_LOGIT_CHANGES[type(extra)](extra) for extra in extras if type(extra) in _LOGIT_CHANGES]


_LOGIT_CHANGES: dict[type, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    LogitScale: lambda extra: lambda logits: logits * extra.factor,
    LogitSoftcap: lambda extra: lambda logits: extra.cap * torch.tanh(logits / extra.cap),
}


def _change_logits(model: nn.Module, extra: LogitScale | LogitSoftcap) -> None:
    change = _LOGIT_CHANGES[type(extra)](extra)

    def changed(_: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output
        return change(logits), bias

    if hasattr(model, "output_layer"):
        model.output_layer.register_forward_hook(changed)


def _make_norm_plain(model: nn.Module, extra: PlainNorm) -> None:
    """Makes a norm plain. Its weight starts at one, like that of other plain norms."""
    for name, module in model.named_modules():
        if name.endswith(f".{extra.module}"):
            module.zero_centered_gamma = False
            nn.init.ones_(module.weight)


def _scale_residuals(model: nn.Module, extra: ResidualScale) -> None:
    for layer in model.decoder.layers:
        for module in (layer.self_attention, layer.mlp):
            _change_output(module, lambda output: output * extra.factor)


def _add_output_norms(model: nn.Module, _: OutputNorms) -> None:
    from megatron.core.extensions.transformer_engine import TENorm

    config = model.config
    for layer in model.decoder.layers:
        for name, module in (("post_self_attn_layernorm", layer.self_attention), ("post_mlp_layernorm", layer.mlp)):
            norm = TENorm(config, config.hidden_size, config.layernorm_epsilon)
            setattr(layer, name, norm)
            _change_output(module, norm)


def _change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Applies `change` to the output of attention or an MLP. These return their last bias separately, to be added later; the
    bias is added here, before the change."""

    def changed(_: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
        result, bias = output
        return change(result if bias is None else result + bias), None

    module.register_forward_hook(changed)


# Latent attention's norms: fused into the linear that follows, or a module before it.
_LATENT_NORMS = (
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.q_layernorm",
    "self_attention.kv_layernorm",
)


def _set_latent_epsilon(model: nn.Module, extra: LatentNormEpsilon) -> None:
    for name, module in model.named_modules():
        if name.endswith(_LATENT_NORMS) and hasattr(module, "eps"):
            module.eps = extra.epsilon


def _bound_time_steps(model: nn.Module, extra: TimeStepMinimum) -> None:
    for module in model.modules():
        if hasattr(module, "dt_bias") and hasattr(module, "cp"):
            bound_time_steps(module, extra.minimum)


def _scale_mlps(model: nn.Module, extra: MlpScale) -> None:
    for layer in model.decoder.layers:
        _change_output(layer.mlp, lambda output: output * extra.factor)


def _cap_attention(model: nn.Module, extra: AttentionSoftcap) -> None:
    from mbridge_rl.megatron.cpu.attention import CoreAttention

    for layer in model.decoder.layers:
        attention = layer.self_attention
        config, group = attention.core_attention.config, attention.pg_collection.cp
        attention.core_attention = CoreAttention(config, layer.layer_number, extra.cap, group)


def _set_rotary(model: nn.Module, extra: RotaryFrequencies) -> None:
    model.rotary_pos_emb = with_frequencies(model.rotary_pos_emb, extra.inv_freq)


def _set_rotary_by_length(model: nn.Module, extra: RotaryFrequenciesByLength) -> None:
    variants = [with_frequencies(model.rotary_pos_emb, inv_freq) for inv_freq in (extra.short, extra.long)]
    model.rotary_pos_emb = RotaryByLength(variants, extra.original_length)


def _set_rotary_by_layer(model: nn.Module, extra: RotaryFrequenciesByLayer) -> None:
    model.rotary_pos_emb = RotaryByLayer([with_frequencies(model.rotary_pos_emb, inv_freq) for inv_freq in extra.inv_freqs])
    for layer in model.decoder.layers:
        RotaryByLayer.choose(layer.self_attention, extra.kinds[layer.layer_number - 1])


def _scale_rotated(model: nn.Module, extra: RotaryScale) -> None:
    def scaled(query: Tensor, _: Any) -> Tensor:
        rotated, rest = query.split([extra.channels, query.shape[-1] - extra.channels], dim=-1)
        return torch.cat([rotated * extra.factor, rest], dim=-1)

    unrotated = model.config.no_rope_freq or [0] * model.config.num_layers
    for layer in model.decoder.layers:
        # Linear attention has neither positions nor a core attention.
        if not unrotated[layer.layer_number - 1] and hasattr(layer.self_attention, "core_attention"):
            _change_query(layer.self_attention.core_attention, scaled)


def _scale_by_position(model: nn.Module, extra: QueryScaleByPosition) -> None:
    def scaled(query: Tensor, packed_seq_params: Any) -> Tensor:
        positions = token_positions(len(query), packed_seq_params, model.pg_collection.cp).to(query.device)
        scale = 1 + extra.beta * torch.log(1 + positions.div(extra.original_length, rounding_mode="floor"))
        return query * scale.to(query.dtype).view(-1, *[1] * (query.dim() - 1))

    for layer in model.decoder.layers:
        _change_query(layer.self_attention.core_attention, scaled)


def _change_query(core_attention: nn.Module, change: Callable[[Tensor, Any], Tensor]) -> None:
    """Applies `change` to the queries. It gets the query `[seq, batch, heads, dim]` or, packed, `[tokens, heads, dim]`, and the
    parameters of packed sequences."""

    def changed(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (change(arguments[0], options.get("packed_seq_params")), *arguments[1:]), options

    core_attention.register_forward_pre_hook(changed, with_kwargs=True)


def _refuse_pixels(model: nn.Module, extra: TextOnly) -> None:
    def refuse(chunk: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        name = chunk.model_spec.architecture
        if given := sorted(option for option in options if option.startswith(("pixel_values", "image_", "video_"))):
            raise UnsupportedModelError(f"{name} is trained on text only here: {', '.join(given)} cannot be given")
        tokens = arguments[0] if arguments else options.get("input_ids")
        if tokens is not None and torch.isin(tokens, torch.tensor(extra.placeholders, device=tokens.device)).any():
            raise UnsupportedModelError(
                f"{name} is trained on text only here: the batch has tokens that stand for images or videos "
                f"({', '.join(map(str, extra.placeholders))}); leave such samples out"
            )

    if model.pre_process and extra.placeholders:
        model.register_forward_pre_hook(refuse, with_kwargs=True)


_ADD: dict[type, Callable[[nn.Module, Any], None]] = {
    EmbeddingScale: _scale_embeddings,
    LogitScale: _change_logits,
    LogitSoftcap: _change_logits,
    PlainNorm: _make_norm_plain,
    ResidualScale: _scale_residuals,
    OutputNorms: _add_output_norms,
    TextOnly: _refuse_pixels,
    MlpScale: _scale_mlps,
    LatentNormEpsilon: _set_latent_epsilon,
    TimeStepMinimum: _bound_time_steps,
    AttentionSoftcap: _cap_attention,
    RotaryFrequencies: _set_rotary,
    RotaryFrequenciesByLength: _set_rotary_by_length,
    RotaryFrequenciesByLayer: _set_rotary_by_layer,
    RotaryScale: _scale_rotated,
    QueryScaleByPosition: _scale_by_position,
    ProjectionNorm: normalize_projections,
    Routing: replace_routing,
}
