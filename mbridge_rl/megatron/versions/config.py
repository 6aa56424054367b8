"""Fields of Megatron's configs: those that not every release has, and those whose layouts of parameters are not mapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mbridge_rl.core.errors import LayoutError, UnsupportedModelError

# Options that need kernels of CUDA, Apex or the real Transformer Engine; on a CPU Megatron's plain code computes the same.
_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
    "persist_layer_norm",
)

# Fields that cut every weight once more, over ranks that `ParallelLayout` does not know (since 0.19).
_WEIGHT_SHARDS = ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")

_INTERLEAVING = "moe_mlp_glu_interleave_size"


def field_names(config_class: type) -> set[str]:
    """The names of the fields that the running release's config has."""
    return {field.name for field in dataclasses.fields(config_class)}


def cpu_fields(known: set[str]) -> dict[str, Any]:
    """The fields that a machine without CUDA needs, of those that the running release has."""
    return {fusion: False for fusion in _FUSIONS if fusion in known}


def quiet_fields(known: set[str]) -> dict[str, Any]:
    """A value that means the same as Megatron's default for the part of a model that CUDA graphs capture, where the default
    itself warns that it is deprecated. The field has another name since 0.18, and the old one then warns."""
    name = "cuda_graph_modules" if "cuda_graph_modules" in known else "cuda_graph_scope"
    return {name: []} if name in known else {}


def refuse_unmapped(config: Any, mapped: Mapping[str, Any]) -> None:
    """Refuses a config whose parameters are stored in a way that no rule describes.

    Args:
        config: Megatron's `TransformerConfig`, of whichever release.
        mapped: the config fields of the model's spec, whose rules follow from them.

    Raises:
        LayoutError: weights are cut by Megatron's generalised tensor parallelism (GTP or EGTP).
        UnsupportedModelError: experts are stored otherwise than the spec's rules say.
    """
    for name in _WEIGHT_SHARDS:
        if (shards := getattr(config, name, 1)) != 1:
            kind = "experts' weights" if name.startswith("expert") else "weights"
            raise LayoutError(
                f"{name}={shards}: Megatron's generalised tensor parallelism (GTP, EGTP), which cuts {kind} once more, is not "
                f"mapped; leave {name.replace('gtp_weight_remat_size', 'tensor_parallel_num_weight_shards')} unset"
            )
    if getattr(config, "moe_single_grouped_weight", False) or getattr(config, "moe_single_grouped_bias", False):
        raise UnsupportedModelError(
            "moe_single_grouped_weight and moe_single_grouped_bias store all experts of a rank in one parameter, which is not "
            "mapped; leave both False"
        )
    if (size := getattr(config, _INTERLEAVING, None)) != (expected := mapped.get(_INTERLEAVING)):
        raise UnsupportedModelError(
            f"{_INTERLEAVING}={size} changes the order of the rows of linear_fc1, and the spec's rules are for {expected}: "
            f"make the bridge with AutoBridge.from_pretrained(..., glu_interleave={size}) and build the model by it"
        )


def refuse_unmapped_groups(parallel_state: Any) -> None:
    """Refuses a running parallel state that another library initialised with Megatron's generalised tensor parallelism.

    Raises:
        LayoutError: it has such ranks.
    """
    for kind, function in (("GTP", "get_gtp_weight_remat_world_size"), ("EGTP", "get_expert_gtp_weight_remat_world_size")):
        size = getattr(parallel_state, function, lambda: 1)()
        if size > 1:
            raise LayoutError(
                f"Megatron's parallel state cuts every weight over {size} more ranks ({kind}), which is not mapped: "
                "initialise it with initialize_parallel(layout), or without gtp_remat_size and expert_gtp_remat_size"
            )
