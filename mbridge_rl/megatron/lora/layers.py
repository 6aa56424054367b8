"""The computation of an adapted linear, in the layout of its own output and for every sharding.

LoRA computes `y + scale * B A dropout(x)`. DoRA computes `magnitude / |W + scale * B A| * (y + scale * B A dropout(x))`, where
every row's norm is treated as a constant.

Only `rank` numbers per token are communicated: a column-parallel adapter gathers (or copies) `A x`, a row-parallel one sums it.
The token dispatcher gathers experts' tokens and sums their outputs, so nothing more is communicated there; the gradients of
their replicated factors are summed over the expert-tensor-parallel ranks instead. Norms of rows that ranks cut are summed, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbridge_rl.core.adapters import FusedRows
from mbridge_rl.megatron.lora.dropout import drop

Mode = Literal["column", "row", "replicated", "expert_column", "expert_row"]


@dataclass
class Adapter:
    """How a linear module applies its adapters.

    Attributes:
        suffixes: the suffixes of the adapted weights' names: `("",)`, or one per expert of a grouped linear.
        rows: the division of the output's rows into adapters.
        dropout: probability that an element of the input is dropped in training.
        base: the original weights, on the host, while the adapters are merged into the weights.
    """

    scale: float
    mode: Mode
    rows: FusedRows
    suffixes: tuple[str, ...]
    dropout: float = 0.0
    enabled: bool = True
    base: dict[str, Tensor] | None = None


def install(module: nn.Module, adapter: Adapter) -> None:
    """Makes `module` add its adapters to its output."""
    module.lora = adapter
    module.register_forward_pre_hook(_ask_for_normalized_input)
    module.register_forward_hook(_add_adapter, prepend=True)  # so that other hooks get the output with adapters


@torch.no_grad()
def merged_weight(module: nn.Module, name: str = "weight", norm: Tensor | None = None) -> Tensor:
    """The weight of this name with its adapter merged, `[out, in]` (local) in its dtype; computed in fp32.

    Args:
        norm: the weight's `row_norms`. With DoRA and without this argument, all ranks that share the weight must call the
            function together.
    """
    suffix, weight = name.removeprefix("weight"), getattr(module, name).detach()
    if module.lora.base is not None:
        return weight
    merged = weight + _delta(module, suffix)
    if (magnitude := _magnitude(module, suffix)) is not None:
        norm = row_norms(module, suffix) if norm is None else norm
        merged *= _factor_of_rows(magnitude.float(), norm, module.lora.rows)[:, None]
    return merged.to(weight.dtype)


def merging(module: nn.Module) -> Callable[[str], Tensor]:
    """Returns a function that computes `merged_weight` by name, without communication. All ranks that share the module call
    this together: with DoRA they sum the norms of rows that ranks cut."""
    adapter = module.lora
    needs_norms = adapter.base is None and _magnitude(module, adapter.suffixes[0]) is not None
    norms = {f"weight{suffix}": row_norms(module, suffix) for suffix in adapter.suffixes} if needs_norms else {}
    return lambda name: merged_weight(module, name, norms.get(name))


@torch.no_grad()
def row_norms(module: nn.Module, suffix: str = "") -> Tensor:
    """`|W + scale * B A|` of every row of this rank, `[out]` fp32, over the full input. Collective where ranks cut rows."""
    squares = (getattr(module, f"weight{suffix}") + _delta(module, suffix)).float().square().sum(dim=1)
    group = cutting_group(module.lora.mode) if module.lora.mode.endswith("row") else None
    if group is not None:
        torch.distributed.all_reduce(squares, group=group)
    return squares.sqrt()


def effective_factors(module: nn.Module, suffix: str) -> tuple[Tensor, Tensor]:
    """`A` and `B` of everything that is added to the weight: the adapter's factors and, behind them, the initial factors that
    are subtracted, as one adapter of twice the rank."""
    factor_a, factor_b = getattr(module, f"lora_a{suffix}"), getattr(module, f"lora_b{suffix}")
    start_a = getattr(module, f"lora_start_a{suffix}", None)
    if start_a is None:
        return factor_a, factor_b
    rank = factor_b.shape[1]
    both = torch.cat([factor.unflatten(0, (-1, rank)) for factor in (factor_a, start_a)], dim=1)
    return both.flatten(0, 1), torch.cat([factor_b, getattr(module, f"lora_start_b{suffix}")], dim=1)


def expand(inner: Tensor, factor_b: Tensor, rows: FusedRows) -> Tensor:
    """Multiplies `B` by the product of every part's own `A`.

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
    for size, index in rows.parts:
        if index is None:
            pieces.append(inner.new_zeros(*inner.shape[:-1], rows.groups, size))
            continue
        part_b = by_group[:, start : start + size].reshape(rows.groups * size, rank)
        product = F.linear(inner[..., index * rank : (index + 1) * rank], part_b)
        pieces.append(product.unflatten(-1, (rows.groups, size)))
        start += size
    return torch.cat(pieces, dim=-1).flatten(-2)


def _ask_for_normalized_input(module: nn.Module, arguments: Any) -> None:
    """Makes a linear with a fused norm return its normalised input, which the adapter needs, for this call only."""
    if hasattr(module, "return_layernorm_output"):
        module.return_layernorm_output = module.lora.enabled and module.lora.base is None


def _add_adapter(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: adds the adapters' output to the linear's, in the form of the linear's own output."""
    adapter = module.lora
    if adapter.base is not None and (module.training or not adapter.enabled):
        raise RuntimeError("this model's adapters are merged into its weights: call unmerge_adapters before")
    if not adapter.enabled or adapter.base is not None:
        return output
    if getattr(module, "return_layernorm_output", False):
        y, bias, x = _without_normalized_input(output)
    else:
        (y, bias), x = output, arguments[0]
    if module.training and adapter.dropout:
        # The module's own flag cannot be used: Transformer Engine clears it on a linear that is not sharded.
        x = drop(x, adapter.dropout, adapter.mode, sequence_parallel=bool(module.config.sequence_parallel))
    sizes = _tokens_per_expert(arguments[1]) if adapter.suffixes != ("",) else None
    products = _expert_products(module, x, sizes) if sizes is not None else [_linear_product(module, x)]
    parts = y.split(sizes) if sizes is not None else [y]
    if _magnitude(module, adapter.suffixes[0]) is not None:
        added = _with_magnitudes(module, parts, products, bias_included=bias is None)
    else:
        added = [adapter.scale * product for product in products]
    return y + (added[0] if len(added) == 1 else torch.cat(added)), bias


def _without_normalized_input(output: tuple[Any, ...]) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output, the bias and the normalised input. Megatron returns TE's tuple `(y, bias, x)` if it requested a bias, and
    otherwise `((y, x), None)`."""
    if len(output) == 3:
        return output
    (y, x), bias = output
    return y, bias, x


def _tokens_per_expert(sizes: Any) -> list[int]:
    return sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)


def _linear_product(module: nn.Module, x: Tensor) -> Tensor:
    (factor_a,), (factor_b,) = _factors(module, x.dtype)
    return expand(_between(module, F.linear(x, factor_a)), factor_b, module.lora.rows)


def _expert_products(module: nn.Module, x: Tensor, sizes: list[int]) -> list[Tensor]:
    """`B A x` of every expert; the tokens are sorted by expert."""
    factors_a, factors_b = _factors(module, x.dtype)
    return [
        expand(F.linear(tokens, factor_a), factor_b, module.lora.rows)
        for tokens, factor_a, factor_b in zip(x.split(sizes), factors_a, factors_b, strict=True)
    ]


def _with_magnitudes(
    module: nn.Module, parts: Sequence[Tensor], products: Sequence[Tensor], *, bias_included: bool
) -> list[Tensor]:
    """The tensors that must be added to each weight's output so that its rows have their magnitudes; a bias has no
    magnitude."""
    adapter, added = module.lora, []
    magnitudes = [getattr(module, f"lora_magnitude{suffix}") for suffix in adapter.suffixes]
    if adapter.mode == "expert_row":
        magnitudes = _summing_gradients(magnitudes)
    for suffix, magnitude, y, product in zip(adapter.suffixes, magnitudes, parts, products, strict=True):
        factor = _factor_of_rows(magnitude, row_norms(module, suffix), adapter.rows).to(y.dtype)
        bias = getattr(module, f"bias{suffix}", None) if bias_included else None
        without_bias = y if bias is None or not bias.numel() else y - bias.to(y.dtype)
        added.append((factor - 1) * without_bias + factor * (adapter.scale * product))
    return added


def _factor_of_rows(magnitude: Tensor, norm: Tensor, rows: FusedRows) -> Tensor:
    """`magnitude / norm` of every row, `[rows]`; 1 in rows without an adapter. The norm is rounded to the magnitude's dtype, so
    that equal values give exactly 1."""
    norm = norm.to(magnitude.dtype)
    if rows.is_complete:
        return magnitude / norm
    mask = (rows.adapter_numbers() >= 0).to(magnitude.device)
    return torch.ones_like(norm).masked_scatter(mask, magnitude / norm[mask])


def _magnitude(module: nn.Module, suffix: str) -> Tensor | None:
    return getattr(module, f"lora_magnitude{suffix}", None)


def _delta(module: nn.Module, suffix: str) -> Tensor:
    """`scale * B A`, `[out, in]` (local) fp32."""
    factor_a, factor_b = (factor.float() for factor in effective_factors(module, suffix))
    return module.lora.scale * expand(factor_a.t(), factor_b, module.lora.rows).t()


def cutting_group(mode: Mode) -> Any | None:
    """The process group whose ranks shard a weight of this mode; `None` if it is not sharded."""
    from megatron.core import parallel_state

    if mode == "replicated":
        return None
    is_expert = mode.startswith("expert")
    group = parallel_state.get_expert_tensor_parallel_group() if is_expert else parallel_state.get_tensor_model_parallel_group()
    return group if group.size() > 1 else None


def _factors(module: nn.Module, dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """All `A` and all `B` of the module."""
    pairs = [effective_factors(module, suffix) for suffix in module.lora.suffixes]
    factors_a, factors_b = ([factor.to(dtype) for factor in factors] for factors in zip(*pairs, strict=True))
    match module.lora.mode:
        case "expert_column":
            factors_a = _summing_gradients(factors_a)
        case "expert_row":
            factors_b = _summing_gradients(factors_b)
    return factors_a, factors_b


def _summing_gradients(factors: list[Tensor]) -> Sequence[Tensor]:
    """The same factors, whose gradients are summed over the expert-tensor-parallel group: each rank computes a part of them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    group = parallel_state.get_expert_tensor_parallel_group()
    if group.size() == 1:
        return factors
    return mappings.copy_to_tensor_model_parallel_region(torch.stack(factors), group=group).unbind()


def _between(module: nn.Module, inner: Tensor) -> Tensor:
    """Converts `A x` from the layout of a linear's input to that of its output, over the tensor-parallel group."""
    from megatron.core.tensor_parallel import mappings

    if cutting_group(module.lora.mode) is None:
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
