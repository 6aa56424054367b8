"""Megatron's model of Mamba and attention layers: how layers are distributed over pipeline stages, and what the class is
called."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from torch import nn


def stack_spec() -> Any:
    """Megatron's spec of a stack of Mamba, attention, MLP and expert layers, which has another name and place since 0.18."""
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    except ImportError:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

        return mamba_stack_spec
    return hybrid_stack_spec


def model_of_stack(stack: Any, pattern: str, arguments: dict[str, Any]) -> nn.Module:
    """A `MambaModel` (since 0.18 a `HybridModel`) whose pipeline stages hold the layers that the config's pipeline layout says.

    Args:
        stack: Megatron's spec of the layers.
        pattern: a letter per layer, which names its kind.
        arguments: the model's other arguments.
    """
    if hasattr(stack.module, "_select_layers_for_pipeline_parallel"):
        return _of_release_0_16(stack, pattern, arguments)
    arguments = {**arguments, "hybrid_layer_pattern": _divided(pattern, arguments["config"])}
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError:  # 0.17
        from megatron.core.models.mamba import MambaModel

        return MambaModel(mamba_stack_spec=stack, **arguments)
    return HybridModel(hybrid_stack_spec=stack, **arguments)


def _of_release_0_16(stack: Any, pattern: str, arguments: dict[str, Any]) -> nn.Module:
    """0.16's stack supports only even splits, while its attention layers follow the layout."""
    from megatron.core.models.mamba import MambaModel
    from megatron.core.transformer.enums import LayerType

    class Stack(stack.module):  # type: ignore[name-defined]
        def _select_layers_for_pipeline_parallel(self, layer_type_list: list[str]) -> tuple[int, list[str]]:
            rank, layout = self.pp_group.rank(), self.config.pipeline_model_parallel_layout
            own_layers = layout.get_layer_id_list(layer_type=LayerType.decoder, pp_rank=rank)
            offset = layout.get_layer_offset(layer_type=LayerType.decoder, pp_rank=rank)
            return offset, [layer_type_list[layer] for layer in own_layers]

    return MambaModel(mamba_stack_spec=replace(stack, module=Stack), hybrid_override_pattern=pattern, **arguments)


def _divided(pattern: str, config: Any) -> str:
    """The pattern with a bar between the layers of different stages, which Megatron reads since 0.17."""
    from megatron.core.transformer.enums import LayerType

    layout = config.pipeline_model_parallel_layout
    if layout is None:
        return pattern
    chunks = range(layout.virtual_pipeline_model_parallel_size or 1)
    places = [(rank, chunk) for chunk in chunks for rank in range(layout.pipeline_model_parallel_size)]
    counts = [layout.layout[rank][chunk].count(LayerType.decoder) for rank, chunk in places]
    return "|".join(pattern[start:stop] for start, stop in pairwise(accumulate(counts, initial=0)))
