"""Builds Megatron-core models from a `ModelSpec`.

The modules are Megatron's own (`GPTModel` or `MambaModel` with their Transformer Engine layer specs), built for the running
parallel state: with a GPU on the GPU, otherwise on the CPU with the pure-torch Transformer Engine of `megatron.cpu`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout, padded_vocab_size
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.decoders import decoder_model, hybrid_model
from mbridge_rl.megatron.extras import add_extras
from mbridge_rl.megatron.parallel import current_layout
from mbridge_rl.megatron.versions import config as versions
from mbridge_rl.megatron.versions.batches import require_context_parallel_delta_nets

# Fields that are set from the layout and the dtype: an override would contradict these.
_FROM_LAYOUT = {
    "num_layers": "the spec",
    "tensor_model_parallel_size": "layout.tp",
    "pipeline_model_parallel_size": "layout.pp",
    "virtual_pipeline_model_parallel_size": "layout.vpp",
    "pipeline_model_parallel_layout": "layout.pipeline_layout",
    "num_layers_in_first_pipeline_stage": "layout.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "layout.last_stage_layers",
    "account_for_embedding_in_pipeline_split": "layout.embedding_as_layer",
    "account_for_loss_in_pipeline_split": "layout.loss_as_layer",
    "expert_model_parallel_size": "layout.ep",
    "expert_tensor_parallel_size": "layout.etp",
    "context_parallel_size": "layout.cp",
    "sequence_parallel": "build_model's sequence_parallel",
    "moe_grouped_gemm": "build_model's grouped_experts",
    "params_dtype": "build_model's dtype",
    "pipeline_dtype": "build_model's dtype",
    "bf16": "build_model's dtype",
    "fp16": "build_model's dtype",
}


def build_model(
    spec: ModelSpec,
    layout: ParallelLayout | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool | None = None,
    grouped_experts: bool = True,
    overrides: Mapping[str, Any] | None = None,
    ddp: bool | Mapping[str, Any] = False,
    config: Any | None = None,
    before_wrapping: Callable[[list[nn.Module]], None] | None = None,
) -> list[nn.Module]:
    """Build this rank's part of the model: one chunk per virtual pipeline stage, in order.

    Parameters have Megatron's names and are initialised by Megatron's rules; load weights to replace them. The vocabulary is
    padded to `core.layout.padded_vocab_size`: logits have the padded width, and callers must not let the padding take part
    in a softmax (`forward_logits` cuts it off). Every innermost `GPTModel` carries `model_spec` and `parallel_layout`.

    Args:
        spec: the model.
        layout: must describe the running parallel state; `None` reads it from there (`parallel.current_layout`).
        dtype: of parameters and activations; bf16 and fp16 are wrapped into Megatron's `Float16Module`, whose outputs are fp32.
        sequence_parallel: `None` turns it on where Megatron demands it (tensor parallelism with experts or with latent
            attention). Without tensor parallelism it is off.
        grouped_experts: whether experts are one module (`mlp.experts.linear_fc1.weight{i}`) or one module each
            (`local_experts.{i}`).
        overrides: further arguments of Megatron's `TransformerConfig`, such as `recompute_granularity`.
        ddp: whether chunks are wrapped in Megatron's `DistributedDataParallel`; a mapping gives arguments of its config. By
            default gradients of models in half precision are accumulated in fp32.
        config: a config that `transformer_config` made from the same spec and layout, possibly changed since. It replaces
            `sequence_parallel`, `grouped_experts`, `overrides` and `dtype`.
        before_wrapping: a function that is called with the bare chunks, for example to freeze parameters that DDP must not
            reduce.

    Raises:
        LayoutError: the layout cannot divide the model, or is not the running one.
        ValueError: Megatron does not know an override, or it contradicts the other arguments.
        ImportError: see `megatron_runtime`.
    """
    with megatron_runtime():
        layout = _running_layout(layout)
        if config is None:
            config = transformer_config(spec, layout, dtype, sequence_parallel, grouped_experts, overrides or {})
        chunks = [build_chunk(spec, layout, config, chunk) for chunk in range(layout.vpp)]
        if before_wrapping is not None:
            before_wrapping(chunks)
        return _wrap(chunks, config, config.params_dtype, ddp)


def transformer_config(
    spec: ModelSpec,
    layout: ParallelLayout,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool | None = None,
    grouped_experts: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Megatron's `TransformerConfig` of a model under a layout; takes the arguments of `build_model` and raises the same
    errors."""
    with megatron_runtime():
        spec.validate(layout)
        if layout.cp > 1 and spec.transformer_config.get("experimental_attention_variant") == "gated_delta_net":
            require_context_parallel_delta_nets(spec.transformer_config, layout)
        return _transformer_config(spec, layout, dtype, sequence_parallel, grouped_experts, overrides or {})


def unwrap(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The `GPTModel` inside every chunk, under any of Megatron's wrappers."""
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    unwrapped = []
    for chunk in chunks:
        while not hasattr(chunk, "decoder") and isinstance(getattr(chunk, "module", None), nn.Module):
            chunk = chunk.module
        unwrapped.append(chunk)
    return unwrapped


def _running_layout(layout: ParallelLayout | None) -> ParallelLayout:
    running = current_layout()
    if layout is None:
        return running
    expected = dataclasses.replace(running.dealing_as(layout), vocab_multiple=layout.vocab_multiple)
    if layout != expected:
        raise LayoutError(f"the running parallel state is {running}, and the model was asked for {layout}")
    return layout


def _transformer_config(
    spec: ModelSpec,
    layout: ParallelLayout,
    dtype: torch.dtype,
    sequence_parallel: bool | None,
    grouped_experts: bool,
    overrides: Mapping[str, Any],
) -> Any:
    """Megatron's config: the spec's fields, then those that follow from the machine and the layout, then `overrides`."""
    latent_attention = bool(spec.transformer_config.get("multi_latent_attention"))
    config_class = _config_class(spec)
    known = versions.field_names(config_class)
    _check_overrides(overrides, known)
    if sequence_parallel is None:
        sequence_parallel = bool(spec.num_experts) or latent_attention
    fields: dict[str, Any] = dict(spec.transformer_config)
    if spec.num_experts:
        fields.setdefault("moe_token_dispatcher_type", "alltoall")
        fields["moe_grouped_gemm"] = grouped_experts
    if not torch.cuda.is_available():
        fields.update(versions.cpu_fields(known))
    fields = {**versions.quiet_fields(known), **fields}
    if layout.cp > 1 and fields.get("window_size"):
        fields.setdefault("cp_comm_type", "all_gather")  # the default, Transformer Engine's ring attention, lacks windows
    if layout.vpp > 1:
        # Batched p2p of interleaved stages silently mixes up tensors on gloo; the overlapped form is correct everywhere.
        fields.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    fields.update(
        num_layers=spec.num_layers,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(spec, layout),
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        context_parallel_size=layout.cp,
        sequence_parallel=sequence_parallel and layout.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    config = config_class(**{**fields, **overrides})
    versions.refuse_unmapped(config, spec.transformer_config)
    return config


def _config_class(spec: ModelSpec) -> type[Any]:
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    if spec.transformer_config.get("multi_latent_attention"):
        return MLATransformerConfig
    heterogeneous = "heterogeneous_layers_config_encoded_json" in spec.transformer_config
    return HeterogeneousTransformerConfig if heterogeneous else TransformerConfig


def _check_overrides(overrides: Mapping[str, Any], known: set[str]) -> None:
    for name in overrides:
        if name in _FROM_LAYOUT:
            raise ValueError(f"override {name!r} contradicts {_FROM_LAYOUT[name]}: set it there")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"override {name!r} is no field of Megatron's TransformerConfig{hint}")


def _pipeline_layout(spec: ModelSpec, layout: ParallelLayout) -> list[list[str]] | None:
    """The split of layers in Megatron's terms: the kinds of layers of each virtual stage, in model order."""
    if layout.num_stages == 1:
        return None
    stages = [["decoder"] * count for count in layout.layers_of_stages(spec.num_layers)]
    stages[layout.mtp_stage] += ["mtp"] * (spec.transformer_config.get("mtp_num_layers") or 0)
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def build_chunk(spec: ModelSpec, layout: ParallelLayout, config: Any, chunk: int) -> nn.Module:
    """Builds this rank's bare virtual stage `chunk` from a `transformer_config`; call it inside of `megatron_runtime`."""
    from megatron.core import parallel_state

    stage = chunk * layout.pp + parallel_state.get_pipeline_model_parallel_rank()
    arguments = {
        "config": config,
        "vocab_size": padded_vocab_size(spec.vocab_size, layout.tp, layout.vocab_multiple),
        "pre_process": stage == 0,
        "post_process": stage == layout.num_stages - 1,
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        **spec.gpt_model,
    }
    if spec.hybrid_pattern is None:
        model = decoder_model(arguments, spec.extras, vp_stage=chunk if layout.vpp > 1 else None)
    else:
        model = hybrid_model(arguments, spec.hybrid_pattern)
    if model.pre_process:
        _carry(model, spec.carried, config.params_dtype)
    add_extras(model, spec.extras)
    model.model_spec, model.parallel_layout = spec, layout
    _mark_experts(model, layout)
    if torch.cuda.is_available():
        model.cuda(torch.cuda.current_device())
    return model


def _carry(model: nn.Module, carried: Mapping[str, Callable[[], nn.Module]], dtype: torch.dtype) -> None:
    """Adds carried modules. They are frozen, since DDP would wait for gradients that a batch of text does not give."""
    for name, build in carried.items():
        setattr(model, name, build().to(dtype).requires_grad_(False))


def _mark_experts(model: nn.Module, layout: ParallelLayout) -> None:
    """Marks the parameters that DDP and the optimizer must reduce over the experts' replicas instead of the dense layers'.

    Megatron marks them only with expert parallelism. If only `etp` differs from `tp`, it would reduce experts over the wrong
    ranks, and replicas would silently drift apart.
    """
    if layout.ep == 1 and layout.expert_tp == layout.tp:
        return
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def _wrap(chunks: list[nn.Module], config: Any, dtype: torch.dtype, ddp: bool | Mapping[str, Any]) -> list[nn.Module]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    half = dtype in (torch.bfloat16, torch.float16)
    if half:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
        _restore_expert_biases(chunks)
    if ddp is False:
        return chunks
    options = {} if ddp is True else dict(ddp)
    options.setdefault("grad_reduce_in_fp32", half)
    ddp_config = DistributedDataParallelConfig(**options)
    # Buckets overlap communication with the backward pass; only the communication of the first chunk is not hidden by other
    # work.
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]


def _restore_expert_biases(chunks: list[nn.Module]) -> None:
    """Casts routers' expert biases back to fp32. Megatron does so only at the first forward pass, but weights are loaded
    before."""
    for chunk in chunks:
        for module in chunk.modules():
            if getattr(module, "expert_bias", None) is not None:
                module.expert_bias = module.expert_bias.float()
