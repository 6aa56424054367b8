"""Replaces the scoring function of Megatron's routers by `core.extras.Routing`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.extras import Routing


def replace_routing(model: nn.Module, routing: Routing) -> None:
    """Makes every router of `model` use `routing`. Megatron still computes logits, the z-loss and the counts that update the
    bias.

    Raises:
        ValueError: the model's config uses losses or limits that depend on Megatron's own scoring function.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    for module in model.modules():
        if isinstance(module, TopKRouter):
            _check_config(module.config)
            module.routing = partial(_route_tokens, module, routing)


def _check_config(config: Any) -> None:
    for name, expected in {"moe_expert_capacity_factor": None, "moe_router_load_balancing_type": "none"}.items():
        if getattr(config, name) != expected:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: this model's routing is not Megatron's, and knows only {expected!r}"
            )


def _route_tokens(router: Any, routing: Routing, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weights and the mask of the chosen experts, both `[tokens, experts]`, as Megatron's `TopKRouter.routing` returns
    them."""
    logits = logits.view(-1, router.config.num_moe_experts)
    padding_mask = None if padding_mask is None else padding_mask.reshape(-1)
    logits = router.apply_z_loss(logits, padding_mask=padding_mask)
    weights, chosen = route(logits, routing, router.topk, router.expert_bias)
    probabilities = torch.zeros_like(logits).scatter(1, chosen, weights.to(logits.dtype))
    routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    router._apply_expert_bias(routing_map, padding_mask=padding_mask)
    return probabilities, routing_map


def route(logits: Tensor, routing: Routing, topk: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (fp32) and indices, `[tokens, topk]`, of the experts chosen from `logits` `[tokens, experts]`."""
    scores = logits.float().softmax(-1) if routing.score == "softmax" else logits.float().sigmoid()
    preference = scores.detach() if bias is None else scores.detach() + bias
    if routing.chosen_groups < routing.groups:
        preference = preference.masked_fill(~_in_best_groups(preference, routing), float("-inf"))
    chosen = preference.topk(topk, dim=-1).indices
    weights = scores.gather(1, chosen)
    if routing.normalized:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=routing.minimum)
    return weights * routing.scaling_factor, chosen


def _in_best_groups(preference: Tensor, routing: Routing) -> Tensor:
    """`[tokens, experts]` bool: whether the expert is in one of the best groups."""
    grouped = preference.view(len(preference), routing.groups, -1)
    ranks = grouped.topk(routing.group_experts, dim=-1).values.sum(-1)
    best = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, ranks.topk(routing.chosen_groups, dim=-1).indices, True)
    return best.unsqueeze(-1).expand_as(grouped).reshape_as(preference)
