"""Plain, refittable weights for vLLM on a CPU.

vLLM's CPU backend packs weights after loading: linears into oneDNN or AMX layouts (`weight` becomes empty, or, for a tied
lm_head, the packed copy goes stale), experts into a grouped-GEMM layout, causal convolutions into a VNNI one. None of these
can be loaded into again, and vLLM's layerwise reload silently computes with stale copies of experts and tied embeddings.

This module changes engines whose `weight_transfer_config.backend` is "mbridge", and no other engine in the process:

* linears and embeddings stay plain and use `torch.nn.functional.linear`;
* experts keep their plain parameters, and the packed copy is kept beside them;
* everything that is computed from weights (packed experts and convolutions, MLA's absorbed projections) is computed again after
  a load.

Decoding a 0.4 B model takes about 30% longer with this; tiny models take no longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mbridge_rl.sync.vllm.versions import ATTRIBUTES_OF_EXPERT_LAYERS, with_weights

BACKEND = "mbridge"
_PLAIN_CONVOLUTION = "_mbridge_plain_weight"
_PACKED_EXPERTS = "_mbridge_packed"


def install() -> None:
    """Replaces vLLM's two packing functions. Other engines keep vLLM's own behaviour. Idempotent."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    if getattr(utils.dispatch_cpu_unquantized_gemm, "_mbridge", False):
        return
    pack_linear = utils.dispatch_cpu_unquantized_gemm
    pack_experts = CPUUnquantizedExperts.process_weights_after_loading

    def dispatch_cpu_unquantized_gemm(layer: nn.Module, remove_weight: bool) -> None:
        if not is_refittable():
            pack_linear(layer, remove_weight)
        elif layer.weight.ndim == 2:
            layer.cpu_linear = functional.linear
        else:
            _pack_convolution(layer, pack_linear)

    def process_weights_after_loading(self: Any, layer: nn.Module) -> None:
        if is_refittable():
            _pack_experts_aside(self, layer, pack_experts)
        else:
            pack_experts(self, layer)

    dispatch_cpu_unquantized_gemm._mbridge = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
    CPUUnquantizedExperts.process_weights_after_loading = process_weights_after_loading


def is_refittable() -> bool:
    """Whether the engine that is being built uses the backend "mbridge"."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    transfer = config.weight_transfer_config if config is not None else None
    return transfer is not None and transfer.backend == BACKEND


def _pack_convolution(layer: nn.Module, pack_linear: Any) -> None:
    plain = layer.weight.data
    pack_linear(layer, False)
    if layer.weight.data_ptr() != plain.data_ptr():
        setattr(layer, _PLAIN_CONVOLUTION, plain)


def _pack_experts_aside(experts: Any, layer: nn.Module, pack_experts: Any) -> None:
    """Lets vLLM pack a stand-in that holds copies, and makes the kernel use the stand-in's tensors."""
    stand_in = nn.Module()
    for name in ("w13_weight", "w2_weight"):
        copy = getattr(layer, name).data.clone()
        stand_in.register_parameter(name, nn.Parameter(copy, requires_grad=False))
    for name in ATTRIBUTES_OF_EXPERT_LAYERS:
        if hasattr(layer, name):
            setattr(stand_in, name, getattr(layer, name))
    pack_experts(experts, stand_in)
    if hasattr(layer, "w13_bias") and stand_in.w2_weight.numel() != layer.w2_weight.numel():
        raise NotImplementedError(
            f"{type(experts).__name__} pads the experts' intermediate size and they have biases: "
            "this combination cannot be refitted on a CPU yet"
        )
    first_time = not hasattr(experts, _PACKED_EXPERTS)
    setattr(experts, _PACKED_EXPERTS, (stand_in.w13_weight.data, stand_in.w2_weight.data))
    if first_time:
        experts.apply = with_weights(experts.apply, lambda: getattr(experts, _PACKED_EXPERTS))


def restore_plain(model: nn.Module) -> None:
    """Puts back, before a load, the plain weights that packed weights have replaced (causal convolutions)."""
    for module in model.modules():
        if hasattr(module, _PLAIN_CONVOLUTION):
            module.weight.data = module.__dict__.pop(_PLAIN_CONVOLUTION)


def plain_convolutions(model: nn.Module) -> dict[str, Tensor]:
    """The plain weights that packed weights replace now, by parameter name."""
    plain = {name: vars(module).get(_PLAIN_CONVOLUTION) for name, module in model.named_modules()}
    return {f"{name}.weight": tensor for name, tensor in plain.items() if tensor is not None}


@torch.no_grad()
def derive(model: nn.Module, dtype: torch.dtype) -> None:
    """Computes again, after a load, everything that the engine computes from its weights. The current vLLM config must be
    set."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
        if hasattr(module, "_cpu_unpacked_conv_weight"):
            utils.dispatch_cpu_unquantized_gemm(module, False)
        if is_deferred_attention_layer(module):
            module.process_weights_after_loading(dtype)
