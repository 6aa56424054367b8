"""What an adapted linear computes, in the layout of its own output, whatever cuts it: LoRA `y + scale * B A dropout(x)`, or
DoRA `magnitude / |W + scale * B A| * (y + scale * B A dropout(x))` with every row's norm taken for a constant.

Only `rank` numbers per token travel: a column-parallel adapter gathers (or copies) `A x`, a row-parallel one sums it. Experts'
tokens are gathered and their outputs summed by the token dispatcher, so nothing travels there; their replicated factors get
their gradients summed over the expert-tensor-parallel ranks instead. Norms of rows that ranks cut are summed, too.
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
        suffixes: of the weights that have one: `("",)`, or one per expert of a grouped linear.
        rows: which rows of the output come from which `A`.
        dropout: probability that an element of the input is dropped in training.
        base: the weights as they were, on the host, while the adapters are merged into them.
    """

    scale: float
    mode: Mode
    rows: FusedRows
    suffixes: tuple[str, ...]
    dropout: float = 0.0
    enabled: bool = True
    base: dict[str, Tensor] | None = None


def install(module: nn.Module, adapter: Adapter) -> None:
    """Makes `module` add its adapters to what it returns."""
    module.lora = adapter
    module.register_forward_pre_hook(_ask_for_normalized_input)
    module.register_forward_hook(_add_adapter, prepend=True)  # what others make of the output they make of all of it


@torch.no_grad()
def merged_weight(module: nn.Module, name: str = "weight", norm: Tensor | None = None) -> Tensor:
    """What the weight of this name and its adapter are together, `[out, in]` (local) in its dtype; computed in fp32.

    Args:
        norm: `row_norms` of it; with DoRA, without it, all ranks that share the weight must call this together.
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
    """`merged_weight` by name, without communication. Made by all ranks that share the module together: with DoRA they sum the
    norms of rows that are cut."""
    adapter = module.lora
    of_rows = adapter.base is None and _magnitude(module, adapter.suffixes[0]) is not None
    norms = {f"weight{suffix}": row_norms(module, suffix) for suffix in adapter.suffixes} if of_rows else {}
    return lambda name: merged_weight(module, name, norms.get(name))


@torch.no_grad()
def row_norms(module: nn.Module, suffix: str = "") -> Tensor:
    """`|W + scale * B A|` of every row of this rank `[out]` fp32, over the whole input. Collective where ranks cut rows."""
    squares = (getattr(module, f"weight{suffix}") + _delta(module, suffix)).float().square().sum(dim=1)
    group = cutting_group(module.lora.mode) if module.lora.mode.endswith("row") else None
    if group is not None:
        torch.distributed.all_reduce(squares, group=group)
    return squares.sqrt()


def effective_factors(module: nn.Module, suffix: str) -> tuple[Tensor, Tensor]:
    """`A` and `B` of all that is added: with the factors that the adapters started from behind their own, as one adapter of
    twice the rank."""
    factor_a, factor_b = getattr(module, f"lora_a{suffix}"), getattr(module, f"lora_b{suffix}")
    start_a = getattr(module, f"lora_start_a{suffix}", None)
    if start_a is None:
        return factor_a, factor_b
    rank = factor_b.shape[1]
    both = torch.cat([factor.unflatten(0, (-1, rank)) for factor in (factor_a, start_a)], dim=1)
    return both.flatten(0, 1), torch.cat([factor_b, getattr(module, f"lora_start_b{suffix}")], dim=1)


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
        module.return_layernorm_output = module.lora.enabled and module.lora.base is None


def _add_adapter(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: what the linear and its adapters return together, in the form of the linear's own output."""
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
        # Not the module's own flag: Transformer Engine clears it on a linear that is not cut.
        x = drop(x, adapter.dropout, adapter.mode, sequence_parallel=bool(module.config.sequence_parallel))
    sizes = _tokens_per_expert(arguments[1]) if adapter.suffixes != ("",) else None
    products = _of_experts(module, x, sizes) if sizes is not None else [_of_linear(module, x)]
    parts = y.split(sizes) if sizes is not None else [y]
    if _magnitude(module, adapter.suffixes[0]) is not None:
        added = _with_magnitudes(module, parts, products, bias_included=bias is None)
    else:
        added = [adapter.scale * product for product in products]
    return y + (added[0] if len(added) == 1 else torch.cat(added)), bias


def _without_normalized_input(output: tuple[Any, ...]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Megatron passes TE's tuple on where it asked for a bias, `(y, bias, x)`, and else makes `((y, x), None)` of it."""
    if len(output) == 3:
        return output
    (y, x), bias = output
    return y, bias, x


def _tokens_per_expert(sizes: Any) -> list[int]:
    return sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)


def _of_linear(module: nn.Module, x: Tensor) -> Tensor:
    (factor_a,), (factor_b,) = _factors(module, x.dtype)
    return expand(_between(module, F.linear(x, factor_a)), factor_b, module.lora.rows)


def _of_experts(module: nn.Module, x: Tensor, sizes: list[int]) -> list[Tensor]:
    """Tokens come sorted by expert."""
    factors_a, factors_b = _factors(module, x.dtype)
    return [
        expand(F.linear(tokens, factor_a), factor_b, module.lora.rows)
        for tokens, factor_a, factor_b in zip(x.split(sizes), factors_a, factors_b, strict=True)
    ]


def _with_magnitudes(
    module: nn.Module, parts: Sequence[Tensor], products: Sequence[Tensor], *, bias_included: bool
) -> list[Tensor]:
    """What to add to each weight's output so that its rows have their magnitudes; a bias has none."""
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
    """`magnitude / norm` of every row `[rows]`, one where there is no adapter; rounded as the magnitude, so that a magnitude
    that is the norm gives exactly one."""
    norm = norm.to(magnitude.dtype)
    if rows.is_complete:
        return magnitude / norm
    mask = (rows.adapter_numbers() >= 0).to(magnitude.device)
    return torch.ones_like(norm).masked_scatter(mask, magnitude / norm[mask])


def _magnitude(module: nn.Module, suffix: str) -> Tensor | None:
    return getattr(module, f"lora_magnitude{suffix}", None)


def _delta(module: nn.Module, suffix: str) -> Tensor:
    """`scale * B A` `[out, in]` (local) fp32."""
    factor_a, factor_b = (factor.float() for factor in effective_factors(module, suffix))
    return module.lora.scale * expand(factor_a.t(), factor_b, module.lora.rows).t()


def cutting_group(mode: Mode) -> Any | None:
    """The process group whose ranks cut a weight of this mode; `None` where none do."""
    from megatron.core import parallel_state

    if mode == "replicated":
        return None
    of_experts = mode.startswith("expert")
    group = (
        parallel_state.get_expert_tensor_parallel_group() if of_experts else parallel_state.get_tensor_model_parallel_group()
    )
    return group if group.size() > 1 else None


def _factors(module: nn.Module, dtype: torch.dtype) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Every `A` and every `B` of the module."""
    pairs = [effective_factors(module, suffix) for suffix in module.lora.suffixes]
    factors_a, factors_b = ([factor.to(dtype) for factor in factors] for factors in zip(*pairs, strict=True))
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
