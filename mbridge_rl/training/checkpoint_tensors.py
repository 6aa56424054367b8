"""A trainer's tensors as shards of Hugging Face tensors: the segments of a plan, in Megatron's words for them.

Weights and Adam's moments are stored under HF names and in HF coordinates, adapters under PEFT's. So nothing in a checkpoint
depends on the layout, the optimizer or the padding that wrote it, and every family that has a mapping has checkpoints.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Segment, Side, megatron_side
from mbridge_rl.megatron.adapters import LiveAdapters, live_adapter_side, lora_config_of
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parameters import LiveParameters, live_side
from mbridge_rl.training.optimizer_state import MOMENTS, parameter_states, whole_states
from mbridge_rl.training.trainer import MegatronTrainer

KINDS = ("master", *MOMENTS)


class TrainerTensors:
    """This rank's part of what a checkpoint holds: all weights or, with adapters, these alone.

    Raises:
        StateMismatchError: the model does not hold what its mapping says.
    """

    def __init__(self, trainer: MegatronTrainer) -> None:
        self._trainer = trainer
        self._live, self._spec, side = _live_side(trainer)
        self._segments = list(_with_replicas(side, dist.get_rank()))
        self._shapes = side.shapes

    @property
    def hf_names(self) -> list[str]:
        """What a checkpoint of this model holds."""
        return list(self._spec.hf_shapes)

    @property
    def fingerprint(self) -> str:
        """Of names and shapes: equal for the same model and adapters, whatever the layout."""
        return self._spec.fingerprint

    def shards(self) -> dict[str, list[Any]]:
        """Megatron's `ShardedTensor`s by key, to be saved; all ranks call it together."""
        states = whole_states(self._trainer.optimizer)
        found: dict[str, list[Any]] = defaultdict(list)
        for segment, replica in self._segments:
            parameter = self._live.parameter(segment.local_name)
            tensors = states.get(parameter) or self._untrained(parameter)
            for kind, tensor in tensors.items():
                if replica == 0:
                    shard = self._view(segment, tensor.float()).contiguous()
                    found[f"{kind}.{segment.hf_name}"].append(self._sharded(kind, segment, replica, shard))
        return dict(found)

    def _untrained(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is saved of a parameter without optimizer state. A frozen factor of an adapter is a part of a PEFT tensor whose
        rest is trained, and a checkpoint's tensors have no holes."""
        moments = MOMENTS if self._trainer.has_adapters else ()
        return {"master": parameter.detach(), **{kind: torch.zeros_like(parameter) for kind in moments}}

    def requests(self, kind: str) -> dict[str, list[Any]]:
        """What this rank wants of `kind`, with memory to load it into."""
        trained = parameter_states(self._trainer.optimizer) if kind != "master" else {}
        wanted: dict[str, list[Any]] = defaultdict(list)
        for segment, replica in self._segments:
            if kind == "master" or self._requires(segment, trained):
                shard = torch.empty(segment.box.size)
                wanted[f"{kind}.{segment.hf_name}"].append(self._sharded(kind, segment, replica, shard))
        return dict(wanted)

    def write(self, kind: str, loaded: dict[str, list[Tensor]]) -> None:
        """Puts what `requests(kind)` got into the model and the optimizer. No communication."""
        states = parameter_states(self._trainer.optimizer)
        wholes: dict[str, Tensor] = {}
        taken: dict[str, int] = defaultdict(int)
        for segment, _ in self._segments:
            key = f"{kind}.{segment.hf_name}"
            if key not in loaded or (kind != "master" and not self._requires(segment, states)):
                continue
            shape = self._shapes[segment.local_name]
            whole = wholes.setdefault(segment.local_name, torch.zeros(shape))
            self._view(segment, whole).copy_(loaded[key][taken[key]])
            taken[key] += 1
        for name, whole in wholes.items():
            parameter = self._live.parameter(name)
            if kind == "master":
                parameter.detach().copy_(whole)
            if parameter in states:
                states[parameter].write(kind, whole)

    def _requires(self, segment: Segment, states: dict[Tensor, Any]) -> bool:
        """Moments belong to what is trained here. With the distributed optimizer a rank may have no part of a parameter."""
        return self._live.parameter(segment.local_name) in states

    @staticmethod
    def _view(segment: Segment, tensor: Tensor) -> Tensor:
        return View(segment.local_name, segment.offset, segment.strides).of(tensor, segment.box.size)

    def _sharded(self, kind: str, segment: Segment, replica: int, data: Tensor) -> Any:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        return ShardedTensor(
            key=f"{kind}.{segment.hf_name}",
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_shape=tuple(self._spec.hf_grid(segment.hf_name)),
            global_offset=segment.box.start,
            axis_fragmentations=None,  # boxes need not form a grid
            replica_id=replica,
        )


def _live_side(trainer: MegatronTrainer) -> tuple[LiveParameters | LiveAdapters, ModelSpec, Side]:
    """The live tensors that a checkpoint holds, compared with the mapping, and where all ranks hold what."""
    spec, rank, layout = unwrap(trainer.model)[0].model_spec, dist.get_rank(), trainer.layout
    if trainer.has_adapters:
        live, _, _ = live_adapter_side(trainer.model, spec, layout, rank)
        spec = adapter_spec(spec, lora_config_of(trainer.model))
    else:
        live, _ = live_side(trainer.model, spec, layout, rank)
    return live, spec, megatron_side(spec, layout)


def _with_replicas(side: Side, rank: int) -> Iterator[tuple[Segment, int]]:
    """This rank's segments, each with how many others hold the same box before it."""
    seen: dict[tuple[str, Any], int] = defaultdict(int)
    for segment in side.segments:
        before = seen[segment.hf_name, segment.box]
        seen[segment.hf_name, segment.box] += len(segment.ranks)
        if rank in segment.ranks:
            yield segment, before + segment.ranks.index(rank)
