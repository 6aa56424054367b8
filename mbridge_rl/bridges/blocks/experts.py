"""Mixtures of experts: the routing of tokens (by Megatron's config, or by a `Routing`) and the mapping of the experts'
weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, MEGATRON_LAYER, Block
from mbridge_rl.core.config_fields import MOST_EXPERTS_OF_ALL_LAYERS
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.rules import Axis, HFPart, Rule, column_parallel, replicated, row_parallel

ROUTER = f"{MEGATRON_LAYER}.mlp.router"


@dataclass(frozen=True)
class ExpertNames:
    """The names of the parts of a layer of experts in a family's checkpoints. Experts without a gate have only `up`."""

    block: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_experts"

    @property
    def first(self) -> tuple[str, ...]:
        """The names of the linears that take an expert's input."""
        return (self.gate, self.up) if self.gate else (self.up,)


MIXTRAL_NAMES = ExpertNames("block_sparse_moe", "w1", "w3", "w2", bias="e_score_correction_bias")


def gated_experts(
    hf: ConfigReader,
    layers: tuple[int, ...],
    routing: Routing,
    *,
    experts: int,
    ffn: int,
    names: ExpertNames = ExpertNames(),
    bias_shape: tuple[int, ...] | None = None,
    fp32_router: bool = False,
    latent: int | None = None,
) -> Block:
    """Experts that are MLPs of inner size `ffn`, gated if `names` have a gate, in `layers`.

    Args:
        latent: size of the experts' inputs and outputs, if it is not the hidden size.
        bias_shape: HF's shape of the bias that affects only the choice; `None` if the routers have none.
        fp32_router: whether the family computes routers' logits in fp32, whatever the model's dtype.
    """
    if experts % routing.groups or routing.chosen_groups > routing.groups:
        raise CheckpointError(
            f"{hf.architecture}: n_group={routing.groups}, topk_group={routing.chosen_groups}; expected a divisor of the "
            f"{experts} experts, and no more chosen groups than groups"
        )
    h, hf_prefix = hf.hidden_size, f"{HF_LAYER}.{names.block}"
    megatron_prefix, hf_expert = f"{MEGATRON_LAYER}.mlp.experts", f"{hf_prefix}.experts.{{expert}}"
    gate_up = {f"{hf_expert}.{name}.weight": ffn for name in names.first}
    down = f"{hf_expert}.{names.down}.weight"
    rules = [
        replicated(f"{MEGATRON_LAYER}.pre_mlp_layernorm.weight", f"{HF_LAYER}.post_attention_layernorm.weight", (h,)),
        replicated(f"{ROUTER}.weight", f"{hf_prefix}.gate.weight", (experts, h)),
        column_parallel(f"{megatron_prefix}.linear_fc1.weight{{expert}}", gate_up, (latent or h,), axis="etp"),
        row_parallel(f"{megatron_prefix}.linear_fc2.weight{{expert}}", down, (latent or h, ffn), axis="etp"),
    ]
    if bias_shape:
        rules.append(_expert_bias(f"{hf_prefix}.{names.bias}", bias_shape))
    config = {
        **expert_config(hf, layers, experts=experts, ffn=ffn),
        "moe_router_dtype": "fp32" if fp32_router else None,
        **_routing_config(routing, hf.num_experts_per_tok, biased=bias_shape is not None),
    }
    extras = () if _is_megatrons(routing, hf.num_experts_per_tok, biased=bias_shape is not None) else (routing,)
    return Block(config, tuple(rules), num_experts=experts, extras=extras).only_in(layers)


def expert_config(hf: ConfigReader, layers: tuple[int, ...], *, experts: int, ffn: int) -> dict[str, Any]:
    """The config fields of every layer of experts. Load balancing is off, since it is for pretraining."""
    if hf.num_experts_per_tok > experts:
        raise CheckpointError(
            f"{hf.architecture}: num_experts_per_tok={hf.num_experts_per_tok}; expected at most the number of experts, "
            f"{experts}"
        )
    if experts * len(layers) > MOST_EXPERTS_OF_ALL_LAYERS:
        raise CheckpointError(
            f"{hf.architecture}: {experts} experts in each of {len(layers)} layers; expected at most "
            f"{MOST_EXPERTS_OF_ALL_LAYERS} in all layers together"
        )
    return {
        "num_moe_experts": experts,
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": ffn,
        "moe_layer_freq": [int(layer in layers) for layer in range(hf.num_hidden_layers)],
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def sigmoid_experts(hf: ConfigReader, layers: tuple[int, ...]) -> tuple[Block, ...]:
    """The experts of DeepSeek-V3 and GLM-4.5: chosen by sigmoid scores plus a bias, beside shared experts."""
    hf.require("scoring_func", "sigmoid")
    hf.require("topk_method", "noaux_tc")
    routing = Routing(
        "sigmoid",
        normalized=hf.norm_topk_prob,
        scaling_factor=hf.routed_scaling_factor,
        groups=hf.n_group or 1,
        chosen_groups=hf.topk_group or 1,
    )
    experts, ffn = hf.n_routed_experts, hf.moe_intermediate_size
    routed = gated_experts(hf, layers, routing, experts=experts, ffn=ffn, bias_shape=(experts,), fp32_router=True)
    return (routed, shared_experts(hf, layers, ffn * hf.n_shared_experts)) if hf.n_shared_experts else (routed,)


def shared_experts(
    hf: ConfigReader,
    layers: tuple[int, ...],
    ffn: int,
    *,
    names: ExpertNames = ExpertNames(),
    gate: str | None = None,
) -> Block:
    """A gated MLP beside the experts that processes every token; its output is multiplied by the sigmoid of the linear `gate`,
    if there is one."""
    h, megatron_prefix, hf_prefix = hf.hidden_size, f"{MEGATRON_LAYER}.mlp.shared_experts", f"{HF_LAYER}.{names.block}"
    mlp = f"{hf_prefix}.{names.shared}"
    rules = [
        column_parallel(f"{megatron_prefix}.linear_fc1.weight", {f"{mlp}.{name}.weight": ffn for name in names.first}, (h,)),
        row_parallel(f"{megatron_prefix}.linear_fc2.weight", f"{mlp}.{names.down}.weight", (h, ffn)),
    ]
    if gate:
        rules.append(replicated(f"{megatron_prefix}.gate_weight", f"{hf_prefix}.{gate}.weight", (1, h)))
    config = {"moe_shared_expert_intermediate_size": ffn, "moe_shared_expert_gate": gate is not None}
    return Block(config, tuple(rules)).only_in(layers)


def dense_then_sparse(hf: ConfigReader) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The `first_k_dense_replace` dense layers, and the layers of experts after them."""
    dense = min(hf.first_k_dense_replace, hf.num_hidden_layers)
    return tuple(range(dense)), tuple(range(dense, hf.num_hidden_layers))


def _expert_bias(hf_name: str, shape: tuple[int, ...]) -> Rule:
    axes = (*(Axis(extent) for extent in shape[:-1]), Axis(shape[-1], along=0))
    return Rule(f"{ROUTER}.expert_bias", (HFPart(hf_name, axes),), (0,), dtype=torch.float32)


def _is_megatrons(routing: Routing, topk: int, *, biased: bool) -> bool:
    """Whether Megatron's own function computes the same; it ranks a group by its `topk // chosen_groups` best scores."""
    grouped = routing.chosen_groups < routing.groups
    if grouped and topk // routing.chosen_groups != routing.group_experts:
        return False
    if routing.normalized and topk == 1:  # Megatron does not normalise a single score
        return False
    return routing.normalized if routing.score == "sigmoid" else not biased and not (grouped and routing.normalized)


def _routing_config(routing: Routing, topk: int, *, biased: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        # Megatron supports a bias only with sigmoid scores; `Routing` computes other scores.
        "moe_router_score_function": "sigmoid" if biased else routing.score,
        # Softmax over the chosen logits equals choosing from the softmax and renormalising; without renormalisation the
        # softmax has to come first.
        "moe_router_pre_softmax": routing.score == "softmax" and not biased and not (routing.normalized and topk > 1),
        "moe_router_enable_expert_bias": biased,
        # Load balancing is for pretraining: here the bias changes only by an override of build_model.
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": None if routing.scaling_factor == 1.0 else routing.scaling_factor,
    }
    if routing.chosen_groups < routing.groups and _is_megatrons(routing, topk, biased=biased):
        config |= {"moe_router_num_groups": routing.groups, "moe_router_group_topk": routing.chosen_groups}
    return config
