"""What an adapted linear computes: `scale * B A x` in the layout of the linear's own output, whatever cuts the linear.

Only `rank` numbers per token travel: a column-parallel adapter gathers (or copies) `A x`, a row-parallel one sums it. Experts'
tokens are gathered and their outputs summed by the token dispatcher, so nothing travels there; their replicated factors get
their gradients summed over the expert-tensor-parallel ranks instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbridge_rl.core.adapters import FusedRows

Mode = Literal["column", "row", "replicated", "expert_column", "expert_row"]


@dataclass
class Adapter:
    """How a linear module applies its adapters.

    Attributes:
        suffixes: of the weights that have one: `("",)`, or one per expert of a grouped linear.
        rows: which rows of the output come from which `A`.
    """

    scale: float
    mode: Mode
    rows: FusedRows
    suffixes: tuple[str, ...]
    enabled: bool = True


def install(module: nn.Module, adapter: Adapter) -> None:
    """Makes `module` add its adapters to what it returns."""
    module.lora = adapter
    module.register_forward_pre_hook(_ask_for_normalized_input)
    module.register_forward_hook(_add_adapter)


@torch.no_grad()
def merged_weight(module: nn.Module, base: Tensor, suffix: str = "") -> Tensor:
    """`base + scale * B A`, the factors as this rank holds them, `[out, in]` (local) in base's dtype; summed in fp32."""
    factor_a, factor_b = (getattr(module, f"{factor}{suffix}").float() for factor in ("lora_a", "lora_b"))
    delta = expand(factor_a.t(), factor_b, module.lora.rows).t()
    return (base + module.lora.scale * delta).to(base.dtype)


def expand(inner: Tensor, factor_b: Tensor, rows: FusedRows) -> Tensor:
    """`B` times what every part's own `A` gave.

    Args:
        inner: `[..., adapters * rank]`, the products of all `A`.
        factor_b: `[adapted rows, rank]`.

    Returns:
        `[..., rows]`, zero in parts without an adapter.
    """
    rank = factor_b.shape[1]
    if inner.shape[-1] == rank and rows.is_complete:  # one `A` for all
        return F.linear(inner, factor_b)
    by_group = factor_b.view(rows.groups, -1, rank)
    pieces, start = [], 0
    for size, which in rows.parts:
        if which is None:
            pieces.append(inner.new_zeros(*inner.shape[:-1], rows.groups, size))
            continue
        of_part = by_group[:, start : start + size].reshape(rows.groups * size, rank)
        product = F.linear(inner[..., which * rank : (which + 1) * rank], of_part)
        pieces.append(product.unflatten(-1, (rows.groups, size)))
        start += size
    return torch.cat(pieces, dim=-1).flatten(-2)


def _ask_for_normalized_input(module: nn.Module, arguments: Any) -> None:
    """A linear with a fused norm returns its normalised input, which the adapter needs, for this call only."""
    if hasattr(module, "return_layernorm_output"):
        module.return_layernorm_output = module.lora.enabled


def _add_adapter(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: adds `scale * B A x` to what the linear returned, and returns what it returns without adapters."""
    if not module.lora.enabled:
        return output
    if getattr(module, "return_layernorm_output", False):
        y, bias, x = _without_normalized_input(output)
    else:
        (y, bias), x = output, arguments[0]
    grouped = module.lora.suffixes != ("",)
    product = _of_experts(module, x, arguments[1]) if grouped else _of_linear(module, x)
    return y + module.lora.scale * product, bias


def _without_normalized_input(output: tuple[Any, ...]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Megatron passes TE's tuple on where it asked for a bias, `(y, bias, x)`, and else makes `((y, x), None)` of it."""
    if len(output) == 3:
        return output
    (y, x), bias = output
    return y, bias, x


def _of_linear(module: nn.Module, x: Tensor) -> Tensor:
    (factor_a,), (factor_b,) = _factors(module, x.dtype)
    return expand(_between(module, F.linear(x, factor_a)), factor_b, module.lora.rows)


def _of_experts(module: nn.Module, x: Tensor, tokens_per_expert: Any) -> Tensor:
    """Tokens come sorted by expert."""
    sizes = tokens_per_expert.tolist() if isinstance(tokens_per_expert, Tensor) else list(tokens_per_expert)
    factors_a, factors_b = _factors(module, x.dtype)
    products = [
        expand(F.linear(tokens, factor_a), factor_b, module.lora.rows)
        for tokens, factor_a, factor_b in zip(x.split(sizes), factors_a, factors_b, strict=True)
    ]
    return torch.cat(products)


def _factors(module: nn.Module, dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Every `A` and every `B` of the module."""
    factors_a, factors_b = (
        [getattr(module, f"{factor}{suffix}").to(dtype) for suffix in module.lora.suffixes] for factor in ("lora_a", "lora_b")
    )
    match module.lora.mode:
        case "expert_column":
            factors_a = _summing_gradients(factors_a)
        case "expert_row":
            factors_b = _summing_gradients(factors_b)
    return factors_a, factors_b


def _summing_gradients(factors: list[Tensor]) -> Sequence[Tensor]:
    """The same factors; each rank of the expert-tensor-parallel group sees a part of their gradient."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    group = parallel_state.get_expert_tensor_parallel_group()
    if group.size() == 1:
        return factors
    return mappings.copy_to_tensor_model_parallel_region(torch.stack(factors), group=group).unbind()


def _between(module: nn.Module, inner: Tensor) -> Tensor:
    """From the layout of a linear's input to that of its output, over the tensor-parallel group."""
    from megatron.core.tensor_parallel import mappings

    if module.tp_size == 1:
        return inner
    match module.lora.mode, bool(module.sequence_parallel):
        case "column", True:
            return mappings.gather_from_sequence_parallel_region(inner)
        case "column", False:
            return mappings.copy_to_tensor_model_parallel_region(inner)
        case "row", True:
            return mappings.reduce_scatter_to_sequence_parallel_region(inner)
        case "row", False:
            return mappings.reduce_from_tensor_model_parallel_region(inner)
    return inner
