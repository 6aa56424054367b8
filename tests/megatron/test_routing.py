"""Routing: ours against Transformers' routers, and against Megatron's where the bridge leaves it to Megatron."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES
from ranks import run_ranks
from tolerance import assert_near, rounding
from torch import Tensor, nn

from mbridge_rl.bridges import model_spec
from mbridge_rl.bridges.blocks.experts import gated_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.model import build_model
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.routing import route

HIDDEN, TOKENS = 16, 50
# Of the same logits: exponentials, their sum over 12 experts, and the sum over those chosen.
ROUNDING = rounding(12, 3)

# (model type, router class, its config, what the bridge makes of it)
ROUTERS = {
    "v3": ("deepseek_v3", "DeepseekV3TopkRouter", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}, "sigmoid"),
    "v3-of-3": ("deepseek_v3", "DeepseekV3TopkRouter", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}, "sigmoid"),
    "v3-top-1": ("deepseek_v3", "DeepseekV3TopkRouter", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}, "sigmoid"),
    "v3-raw": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "norm_topk_prob": False},
        "sigmoid",
    ),
    "v2-greedy": ("deepseek_v2", "DeepseekV2TopkRouter", {"num_experts_per_tok": 3, "routed_scaling_factor": 1.5}, "softmax"),
    "v2-groups": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
        "softmax",
    ),
    "ernie": ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", {"num_experts_per_tok": 3, "num_experts": 12}, "softmax"),
}


def tensors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ROUTERS)
def test_transformers_routers(name: str) -> None:
    """Indices and weights of our function are those of the family's own module, with a bias that changes the choice."""
    import transformers

    model_type, class_name, fields, score = ROUTERS[name]
    config = transformers.CONFIG_MAPPING[model_type](
        hidden_size=HIDDEN, num_attention_heads=4, **{"n_routed_experts": 12} | fields
    )
    router = getattr(getattr(transformers.models, model_type), f"modeling_{model_type}").__dict__[class_name](config)
    bias = randomize(router)
    hidden = tensors(TOKENS, HIDDEN, seed=1)
    logits, weights, chosen = router(hidden)
    groups = getattr(config, "n_group", None) or 1
    routing = Routing(
        score,  # type: ignore[arg-type]
        normalized=model_type == "ernie4_5_moe" or (model_type == "deepseek_v3" and config.norm_topk_prob),
        scaling_factor=getattr(config, "routed_scaling_factor", 1.0),
        groups=groups,
        chosen_groups=getattr(config, "topk_group", None) or groups,
        group_experts=1 if model_type == "deepseek_v2" else 2,
    )
    our_weights, our_indices = route(logits, routing, config.num_experts_per_tok, bias)
    assert_near(spread(our_weights, our_indices), spread(weights, chosen), ROUNDING)


def randomize(router: nn.Module) -> Tensor | None:
    """Random weights; returns the bias that choosing sees."""
    bias = None
    with torch.no_grad():
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            tensor.copy_(tensors(*tensor.shape))
            bias = tensor.flatten() if "bias" in name else bias
    return bias


def spread(weights: Tensor, chosen: Tensor) -> Tensor:
    """`[tokens, experts]`: zero where an expert was not chosen."""
    return torch.zeros(len(weights), 12).scatter(1, chosen, weights.float())


@pytest.mark.parametrize(
    ("routing", "topk", "biased", "megatrons"),
    [
        (Routing(), 3, False, True),
        (Routing(normalized=False, scaling_factor=2.5), 3, False, True),
        (Routing(normalized=False), 1, False, True),
        (Routing(normalized=False, groups=4, chosen_groups=2, group_experts=1), 3, False, True),
        (Routing("sigmoid", scaling_factor=2.5), 3, True, True),
        (Routing("sigmoid", groups=4, chosen_groups=2), 4, True, True),
        (Routing(), 1, False, False),
        (Routing(), 3, True, False),
        (Routing(groups=4, chosen_groups=2), 4, False, False),
        (Routing("sigmoid", normalized=False), 3, True, False),
        (Routing("sigmoid"), 1, True, False),
        (Routing("sigmoid", groups=4, chosen_groups=2), 2, True, False),
    ],
)
def test_what_is_left_to_megatron_is_the_same(routing: Routing, topk: int, biased: bool, megatrons: bool) -> None:
    hf = SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=1, num_experts_per_tok=topk, architecture="Test")
    block = gated_experts(hf, (0,), routing, experts=12, ffn=32, bias_shape=(12,) if biased else None)
    assert block.extras == (() if megatrons else (routing,))
    if not megatrons:
        return
    logits, bias = tensors(TOKENS, 12), 0.3 * tensors(12, seed=1) if biased else None
    with megatron_runtime():
        from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

        probabilities, _ = topk_routing_with_score_function(
            logits,
            topk,
            use_pre_softmax=block.config["moe_router_pre_softmax"],
            num_groups=block.config.get("moe_router_num_groups"),
            group_topk=block.config.get("moe_router_group_topk"),
            scaling_factor=block.config["moe_router_topk_scaling_factor"],
            score_function=block.config["moe_router_score_function"],
            expert_bias=bias,
        )
    assert_near(spread(*route(logits, routing, topk, bias)), probabilities, ROUNDING)


def test_choosing_has_no_gradient_and_weighing_has() -> None:
    logits, bias = tensors(TOKENS, 12).requires_grad_(), tensors(12, seed=1).requires_grad_()
    weights, _ = route(logits, Routing("sigmoid", normalized=False), 2, bias)
    weights.sum().backward()
    assert bias.grad is None
    assert logits.grad is not None
    assert (logits.grad != 0).sum() == 2 * TOKENS


def build_with(rank: int, override: dict[str, Any]) -> None:
    initialize_parallel(ParallelLayout())
    with pytest.raises(ValueError, match=next(iter(override))):
        build_model(model_spec(FAMILIES["deepseek-v3"].hf_config()), overrides=override)


@pytest.mark.parametrize("override", [{"moe_expert_capacity_factor": 1.0}, {"moe_router_load_balancing_type": "aux_loss"}])
def test_options_that_need_megatrons_function_are_refused(override: dict[str, Any]) -> None:
    run_ranks(build_with, 1, override)
