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
from mbridge_rl.megatron.lora.adapter_side import LiveAdapters, live_adapter_side, lora_config_of
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parameters import LiveParameters, live_side
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer
from mbridge_rl.training.trainer.optimizer_state import MOMENTS, ParameterState, dealt_parameters, parameter_states

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
        self._dealt = dealt_parameters(trainer.optimizer)
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
        """Megatron's `ShardedTensor`s by key, to be saved: of what several ranks hold, the first's; of what the distributed
        optimizer deals to the first and its data-parallel replicas, every one's own part. No communication."""
        states, found = parameter_states(self._trainer.optimizer), defaultdict(list)
        for segment, replica, first in self._segments:
            parameter = self._live.parameter(segment.local_name)
            state = states.get(parameter)
            dealt = self._dealt.get(parameter)
            if replica if dealt is None else first not in dealt:
                continue
            if state is None and dealt is None:
                pieces = {kind: [(segment, self._view(segment, whole))] for kind, whole in self._untrained(parameter).items()}
            else:
                pieces = {kind: list(self._pieces(segment, state, kind)) for kind in KINDS if state is not None}
            for kind, of_kind in pieces.items():
                shards = (self._sharded(kind, piece, 0, view.float().contiguous()) for piece, view in of_kind)
                found[f"{kind}.{segment.hf_name}"] += shards
        return {key: shards for key, shards in found.items() if shards}

    def _untrained(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is saved of a parameter without optimizer state. A frozen factor of an adapter is a part of a PEFT tensor whose
        rest is trained, and a checkpoint's tensors have no holes."""
        moments = MOMENTS if self._trainer.has_adapters else ()
        return {"master": parameter.detach(), **{kind: torch.zeros_like(parameter) for kind in moments}}

    def requests(self, kind: str) -> dict[str, list[Any]]:
        """What this rank wants of `kind`, with memory to load it into."""
        wanted: dict[str, list[Any]] = defaultdict(list)
        for segment, replica, piece in self._wanted(kind):
            shard = torch.empty(piece.box.size)
            wanted[f"{kind}.{segment.hf_name}"].append(self._sharded(kind, piece, replica, shard))
        return dict(wanted)

    def write(self, kind: str, loaded: dict[str, list[Tensor]]) -> None:
        """Puts what `requests(kind)` got into the model and the optimizer. No communication."""
        states = parameter_states(self._trainer.optimizer)
        wholes: dict[str, Tensor] = {}
        taken: dict[str, int] = defaultdict(int)
        for segment, _, piece in self._wanted(kind):
            key = f"{kind}.{segment.hf_name}"
            if key not in loaded:
                continue
            shard, name = loaded[key][taken[key]], segment.local_name
            taken[key] += 1
            if kind == "master":
                whole = wholes.setdefault(name, torch.zeros(self._shapes[name]))
                self._view(piece, whole).copy_(shard)
            else:
                states[self._live.parameter(name)].view(kind, piece).copy_(shard)
        for name, whole in wholes.items():
            parameter = self._live.parameter(name)
            parameter.detach().copy_(whole)
            if parameter in states:
                states[parameter].write_master(whole)

    def _wanted(self, kind: str) -> Iterator[tuple[Segment, int, Segment]]:
        """`(segment, replica, piece of it)`: whole weights, and of moments what is trained here, of which the distributed
        optimizer leaves each rank a part."""
        states = parameter_states(self._trainer.optimizer) if kind != "master" else {}
        for segment, replica, _ in self._segments:
            if kind == "master":
                yield segment, replica, segment
            elif (state := states.get(self._live.parameter(segment.local_name))) is not None:
                for piece, _ in self._pieces(segment, state, kind):
                    yield segment, replica, piece

    @staticmethod
    def _pieces(segment: Segment, state: ParameterState, kind: str) -> Iterator[tuple[Segment, Tensor]]:
        """The boxes of a segment that this rank's part of the parameter covers, and where they are in the state."""
        for piece in segment.within(state.begin, state.begin + state.master.numel()):
            yield piece, state.view(kind, piece)

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


def _with_replicas(side: Side, rank: int) -> Iterator[tuple[Segment, int, int]]:
    """This rank's segments, each with how many others hold the same box before it, and which rank is the first of them."""
    seen: dict[tuple[str, Any], int] = defaultdict(int)
    first: dict[tuple[str, Any], int] = {}
    for segment in side.segments:
        box = (segment.hf_name, segment.box)
        before = seen[box]
        seen[box] += len(segment.ranks)
        first.setdefault(box, segment.ranks[0])
        if rank in segment.ranks:
            yield segment, before + segment.ranks.index(rank), first[box]
