"""A trainer's tensors as shards of Hugging Face tensors: the segments of a plan as Megatron's `ShardedTensor`s.

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
    """This rank's part of a checkpoint: all weights or, with adapters, the adapters alone.

    Raises:
        StateMismatchError: the model does not hold the tensors that its mapping describes.
    """

    def __init__(self, trainer: MegatronTrainer) -> None:
        self._trainer = trainer
        self._live, self._spec, side = _live_side(trainer)
        self._segments = list(_with_replicas(side, dist.get_rank()))
        self._dealt = dealt_parameters(trainer.optimizer)
        self._shapes = side.shapes

    @property
    def hf_names(self) -> list[str]:
        """The names of the tensors in a checkpoint of this model."""
        return list(self._spec.hf_shapes)

    @property
    def fingerprint(self) -> str:
        """A fingerprint of names and shapes: equal for the same model and adapters, whatever the layout."""
        return self._spec.fingerprint

    def shards(self) -> dict[str, list[Any]]:
        """Megatron's `ShardedTensor`s that this rank saves, by key. Without communication.

        Where several ranks hold the same box, the first one saves it. Where the distributed optimizer deals its state to the
        first rank and its data-parallel replicas, each of them saves its own part.
        """
        states, shards_by_key = parameter_states(self._trainer.optimizer), defaultdict(list)
        for segment, replica, first in self._segments:
            parameter = self._live.parameter(segment.local_name)
            state = states.get(parameter)
            dealt = self._dealt.get(parameter)
            if replica if dealt is None else first not in dealt:
                continue
            if state is None and dealt is None:
                pieces = {kind: [(segment, self._view(segment, full))] for kind, full in self._untrained(parameter).items()}
            else:
                pieces = {kind: list(self._pieces(segment, state, kind)) for kind in KINDS if state is not None}
            for kind, pieces_of_kind in pieces.items():
                shards = (self._sharded(kind, piece, 0, view.float().contiguous()) for piece, view in pieces_of_kind)
                shards_by_key[f"{kind}.{segment.hf_name}"] += shards
        return {key: shards for key, shards in shards_by_key.items() if shards}

    def _untrained(self, parameter: Tensor) -> dict[str, Tensor]:
        """The tensors that are saved for a parameter without optimizer state, by kind.

        They include zero moments for the frozen factor of an adapter: it is a part of a PEFT tensor whose other parts are
        trained, and a checkpoint's tensors must not have holes.
        """
        moments = MOMENTS if self._trainer.has_adapters else ()
        return {"master": parameter.detach(), **{kind: torch.zeros_like(parameter) for kind in moments}}

    def requests(self, kind: str) -> dict[str, list[Any]]:
        """The shards of `kind` that this rank loads, with memory to load them into."""
        requests: dict[str, list[Any]] = defaultdict(list)
        for segment, replica, piece in self._requested(kind):
            shard = torch.empty(piece.box.size)
            requests[f"{kind}.{segment.hf_name}"].append(self._sharded(kind, piece, replica, shard))
        return dict(requests)

    def write(self, kind: str, loaded: dict[str, list[Tensor]]) -> None:
        """Copies the shards that `requests(kind)` loaded into the model and the optimizer. Without communication."""
        states = parameter_states(self._trainer.optimizer)
        full_tensors: dict[str, Tensor] = {}
        taken: dict[str, int] = defaultdict(int)
        for segment, _, piece in self._requested(kind):
            key = f"{kind}.{segment.hf_name}"
            if key not in loaded:
                continue
            shard, name = loaded[key][taken[key]], segment.local_name
            taken[key] += 1
            if kind == "master":
                full = full_tensors.setdefault(name, torch.zeros(self._shapes[name]))
                self._view(piece, full).copy_(shard)
            else:
                states[self._live.parameter(name)].view(kind, piece).copy_(shard)
        for name, full in full_tensors.items():
            parameter = self._live.parameter(name)
            parameter.detach().copy_(full)
            if parameter in states:
                states[parameter].write_master(full)

    def _requested(self, kind: str) -> Iterator[tuple[Segment, int, Segment]]:
        """Yields `(segment, replica, piece of the segment)` for everything that this rank loads.

        Weights are loaded in full. Moments are loaded only where this rank trains them; the distributed optimizer leaves each
        rank a part of them.
        """
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
    """The live tensors that a checkpoint holds, checked against the mapping; the mapping; and the place of every tensor on all
    ranks."""
    spec, rank, layout = unwrap(trainer.model)[0].model_spec, dist.get_rank(), trainer.layout
    if trainer.has_adapters:
        live, _, _ = live_adapter_side(trainer.model, spec, layout, rank)
        spec = adapter_spec(spec, lora_config_of(trainer.model))
    else:
        live, _ = live_side(trainer.model, spec, layout, rank)
    return live, spec, megatron_side(spec, layout)


def _with_replicas(side: Side, rank: int) -> Iterator[tuple[Segment, int, int]]:
    """Yields this rank's segments, each with the number of ranks before it that hold the same box, and the first such rank."""
    seen: dict[tuple[str, Any], int] = defaultdict(int)
    first: dict[tuple[str, Any], int] = {}
    for segment in side.segments:
        box = (segment.hf_name, segment.box)
        before = seen[box]
        seen[box] += len(segment.ranks)
        first.setdefault(box, segment.ranks[0])
        if rank in segment.ranks:
            yield segment, before + segment.ranks.index(rank), first[box]
