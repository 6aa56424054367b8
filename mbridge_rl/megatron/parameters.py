"""The live Megatron model as a side of a plan: its parameters under global names, and its layout.

Placement follows from names and the configuration, never from `partition_dim` and similar attributes, which Megatron does not
set reliably (expert biases, down projections).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.layout import ParallelLayout, padded_vocab_size
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.pipeline import counted_stages
from mbridge_rl.core.segments import Side, megatron_side
from mbridge_rl.core.tensor_cache import TensorCache
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.live_tensors import LiveTensors
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parallel import current_layout, layout_of_groups
from mbridge_rl.megatron.versions.config import refuse_unmapped
from mbridge_rl.megatron.versions.groups import groups_by_axis
from mbridge_rl.megatron.versions.names import canonical_name

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"(\.experts\.linear_fc[12]\.(?:weight|bias|lora_[a-z_]+))(\d+)$")
_SEQUENTIAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias|lora_[a-z_]+))$")


class LiveParameters(LiveTensors):
    """This rank's parameters by global `megatron_name`, at the time of its creation; make a new one for every transfer. It
    includes the buffers in `buffer_names` (a router's expert bias is one); other buffers are derived state.

    A module with adapters has a method `merging()`, which returns a function that merges one of its `adapted_weights` on
    request. A `TensorCache` holds the results, since the parts of a fused tensor, and the pieces for several workers, are read
    shortly after each other. The functions are made here, by all ranks together, since DoRA sums the norms of rows that ranks
    cut.
    """

    def __init__(self, model: Sequence[nn.Module], experts_before: int, buffer_names: Container[str] = ()) -> None:
        super().__init__()
        self._merging: dict[str, Callable[[], Tensor]] = {}
        merging = self._merging  # a reference to `self` would be a cycle, which is freed late
        self._merged = TensorCache(lambda megatron_name: merging[megatron_name]().detach())
        for chunk in unwrap(model):
            layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            for module_name, module in chunk.named_modules():
                self._add_module(module_name, module, layers, experts_before)
                for name, buffer in module.named_buffers(prefix=module_name, recurse=False):
                    if (global_name := global_name_of(name, layers, experts_before)) in buffer_names:
                        self._parameters[global_name] = buffer

    def _add_module(self, module_name: str, module: nn.Module, layers: list[int], experts_before: int) -> None:
        adapters = getattr(module, "adapter_parameter_names", ())
        merge = module.merging() if adapters else None
        for name, parameter in module.named_parameters(recurse=False):
            if name in adapters:
                continue
            global_name = global_name_of(f"{module_name}.{name}" if module_name else name, layers, experts_before)
            self._parameters[global_name] = parameter
            if merge is not None and name in module.adapted_weights:
                self._merging[global_name] = partial(merge, name)

    def __getitem__(self, megatron_name: str) -> Tensor:
        if megatron_name in self._merging:
            return self._merged[megatron_name]
        return super().__getitem__(megatron_name)


def live_side(
    model: Sequence[nn.Module], spec: ModelSpec, layout: ParallelLayout, rank: int, side: Side | None = None
) -> tuple[LiveParameters, Side]:
    """This rank's live parameters and its side, checked against each other. `side` is `megatron_side(spec, layout, rank)` if
    the caller knows it already.

    Raises:
        StateMismatchError: the model does not hold the tensors that its mapping describes.
        LayoutError, UnsupportedModelError: it stores them in a way that no mapping describes (`refuse_unmapped`).
    """
    refuse_unmapped(unwrap(model)[0].config, spec.transformer_config)
    at = layout.coordinates(rank)
    side = megatron_side(spec, layout, rank) if side is None else side
    live = LiveParameters(model, at.ep * (spec.num_experts or 0) // layout.ep, buffer_names=side.shapes.keys())
    live.check(side, rank)
    return live, side


def layout_of(model: Sequence[nn.Module], spec: ModelSpec) -> ParallelLayout:
    """The layout of a live model: the one that `build_model` stored on it or, for a model built elsewhere, that of the running
    parallel state with the layer split and the vocabulary padding of the model itself. Without such a state it is that of the
    model's own process groups.

    Raises:
        LayoutError: Megatron was initialised with a rank order that cannot be read from it (then pass the layout yourself).
    """
    first = unwrap(model)[0]
    if hasattr(first, "parallel_layout"):
        return first.parallel_layout
    with megatron_runtime():
        layout = _running_layout(first, len(model))
        split = ParallelLayout(pp=layout.pp, vpp=len(model), **_split(first.config, layout.pp, len(model)))
    padded = first.vocab_size
    multiple = 1 if padded == padded_vocab_size(spec.vocab_size, layout.tp) else padded // layout.tp
    return replace(layout.dealing_as(split), vocab_multiple=multiple)


def _running_layout(chunk: nn.Module, chunks: int) -> ParallelLayout:
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized() or not hasattr(chunk, "pg_collection"):
        return current_layout()
    return layout_of_groups(groups_by_axis(chunk.pg_collection), chunks)


def _split(config: Any, pp: int, vpp: int) -> dict[str, tuple[int, ...]]:
    """The layer split of a model built elsewhere. It is read from Megatron's layout, if there is one, since Megatron's own
    function returns only one rank's layers then."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    places = [(rank, chunk) for chunk in range(vpp) for rank in range(pp)]
    if (pipeline_layout := config.pipeline_model_parallel_layout) is not None:
        stage_layers, stage_mtp_layers = counted_stages([pipeline_layout.layout[rank][chunk] for rank, chunk in places])
        return {"stage_layers": stage_layers, "stage_mtp_layers": stage_mtp_layers}
    stages = (chunk if vpp > 1 else None for _, chunk in places)
    counts = (get_num_layers_to_build(config, vp_stage=s, pp_rank=rank) for s, (rank, _) in zip(stages, places, strict=True))
    return {"stage_layers": tuple(counts)}


def model_dtype(model: Sequence[nn.Module]) -> torch.dtype:
    """The dtype with which the model was built; parameters that Megatron keeps in fp32 are cast to it on export."""
    return unwrap(model)[0].config.params_dtype


def world_rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def global_name_of(local_name: str, layers: Sequence[int], experts_before: int) -> str:
    """The global name of a chunk's tensor: its local name, as release 0.16 of Megatron spells it, with the layer and expert
    indices of the whole model."""
    name = _LAYER.sub(lambda match: f"decoder.layers.{layers[int(match[1])]}.", canonical_name(local_name))
    name = _GROUPED_EXPERT.sub(lambda match: f"{match[1]}{int(match[2]) + experts_before}", name)
    return _SEQUENTIAL_EXPERT.sub(lambda match: f".experts.{match[2]}{int(match[1]) + experts_before}", name)
