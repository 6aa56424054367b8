"""A live Megatron model as vLLM's own `WeightSource`, so that vLLM's backends (`nccl`, `ipc`, `sharded_rdt`) can send it.

These backends send full HF tensors, gathered on trainer ranks; `sync.weight_sync.WeightSync` sends shards, in a transaction.
This module is for deployments that already use one of vLLM's backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.core.errors import SyncError, missing_vllm
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import Plan, compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.stream import DEFAULT_BUCKET_BYTES, TensorStream
from mbridge_rl.megatron.parameters import LiveParameters, layout_of, live_side, model_dtype

try:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups
except ImportError as error:
    raise missing_vllm("a source for vLLM's weight transfer needs vLLM") from error

_NEED_GPU = ("nccl", "sparse_nccl", "nccl_m2n", "ipc", "sharded_rdt", "modelexpress")


class MegatronWeightSource(WeightSource):
    """A source that all trainer ranks make once and together. Every iteration is collective, and reads the weights at that
    time.

    Args:
        bridge: the model's bridge.
        model: this rank's chunks; adapters are merged for the export.
        dtype: the dtype of the yielded tensors; `None` means the model's.
        by_stage: whether each pipeline stage yields only its own tensors (`held_names`), for `sharded_rdt`; otherwise every
            rank yields all tensors.
        ranks: the ranks that get tensors, if not `by_stage`: `(0,)` saves the others the gather if only rank 0 sends (`nccl`).
            The other ranks iterate, too, but yield nothing.
        bucket_bytes: see `AutoBridge.export_weights`.

    Raises:
        StateMismatchError: the model is not the bridge's.
        SyncError: on all ranks, if they disagree.
    """

    def __init__(
        self,
        bridge: Any,
        model: Sequence[nn.Module],
        *,
        dtype: torch.dtype | None = None,
        by_stage: bool = False,
        ranks: Sequence[int] | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        if by_stage and ranks is not None:
            raise SyncError("by_stage=True says already which ranks get which tensors: leave ranks=None")
        spec: ModelSpec = bridge.spec
        self._spec, self._model, self._layout = spec, model, layout_of(model, spec)
        world = RankGroup()
        self._rank = world.rank
        self._metadata = _in_group_order(_param_metadata(spec, dtype or model_dtype(model)))
        self._held: frozenset[str] | None = None
        group = world
        if by_stage:
            members = _stage_members(self._layout, world)
            group = RankGroup(members.group)
            plan = _stage_plan(spec, self._layout, members.ranks)
            self._held = frozenset(plan.hf_shapes)
        else:
            plan = compile_plan(spec, megatron_side(spec, self._layout), hf_side(spec))
        order = [metadata.name for metadata in self._metadata if metadata.name in plan.hf_shapes]
        live = self._live()
        self._stream = TensorStream(
            replace(plan, hf_shapes={name: plan.hf_shapes[name] for name in order}),
            {metadata.name: metadata.dtype for metadata in self._metadata},
            group,
            device=next((live.base(name).device for name in live), group.device),
            bucket_bytes=bucket_bytes,
            ranks=ranks,
        )

    def metadata(self) -> list[ParamMeta]:
        """The metadata of the whole model, on every rank. It follows from the mapping, and nothing is exported for it."""
        return list(self._metadata)

    def held_names(self) -> frozenset[str] | None:
        return self._held

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:  # type: ignore[override]
        """Yields `(hf_name, tensor)` in the order of `metadata`; by stage in the order of `groups`, with `None` for tensors of
        other stages."""
        stream = self._stream.run(self._live())
        if self._held is None:
            yield from stream
            return
        for name in (name for group in self.groups() for name in group):
            yield next(stream) if name in self._held else (name, None)
        next(stream, None)  # all ranks of the stage run the stream to its end

    def close(self) -> None:
        """Frees shared memory."""
        self._stream.close()

    def _live(self) -> LiveParameters:
        return live_side(self._model, self._spec, self._layout, self._rank)[0]


def start_trainer(init_info: Any, *, client: Any, source: WeightSource) -> Any:
    """Makes one of vLLM's trainer engines for `source` by `WeightTransferTrainerFactory.trainer_init`; call it on all trainer
    ranks.

    Args:
        init_info: an init info of vLLM, such as `NCCLTrainerInitInfo`, which names the backend.
        client: vLLM's `HTTPVLLMWeightSyncClient`, `RayVLLMWeightSyncClient`, or anything with their methods.

    Raises:
        SyncError: the backend needs a GPU, and this machine has none.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    if init_info.backend in _NEED_GPU and not torch.cuda.is_available():
        raise SyncError(
            f"vLLM's weight-transfer backend {init_info.backend!r} moves CUDA tensors, and this trainer has no GPU: use "
            "WeightSync with an engine of the backend 'mbridge', which works on both"
        )
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)


def _param_metadata(spec: ModelSpec, dtype: torch.dtype) -> list[ParamMeta]:
    return [ParamMeta(tensor.hf_name, tensor.dtype, tuple(tensor.shape)) for tensor in spec.hf_tensors(dtype)]


def _in_group_order(metadata: Sequence[ParamMeta]) -> list[ParamMeta]:
    """The metadata in the order of vLLM's groups of layers, in which vLLM expects all tensors."""
    by_name = {param.name: param for param in metadata}
    return [by_name[name] for group in layerwise_groups([param.name for param in metadata]) for name in group]


class _Members:
    """The ranks of one pipeline stage, and their process group."""

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None) -> None:
        self.ranks, self.group = tuple(ranks), group


def _stage_members(layout: ParallelLayout, world: RankGroup) -> _Members:
    """The members of this rank's stage. All ranks call it together, since torch.distributed makes every group on all ranks."""
    stages: dict[int, list[int]] = {}
    for rank in range(world.size):
        stages.setdefault(layout.coordinates(rank).pp, []).append(rank)
    if len(stages) == 1:
        return _Members(range(world.size), None)
    made = {stage: dist.new_group(ranks) for stage, ranks in stages.items()}
    stage = layout.coordinates(world.rank).pp
    return _Members(stages[stage], made[stage])


def _stage_plan(spec: ModelSpec, layout: ParallelLayout, ranks: Sequence[int]) -> Plan:
    """The plan from the ranks of a stage, numbered within the stage, to the HF tensors that these ranks hold together."""
    all_stages = megatron_side(spec, layout)
    position = {rank: index for index, rank in enumerate(ranks)}
    segments = tuple(
        replace(segment, ranks=stage_ranks)
        for segment in all_stages.segments
        if (stage_ranks := tuple(position[rank] for rank in segment.ranks if rank in position))
    )
    boxes: Mapping[str, set[Any]] = _boxes(all_stages)
    hf_names = {hf_name for hf_name, stage_boxes in _boxes(Side(segments, {}, {})).items() if stage_boxes == boxes[hf_name]}
    shapes = {hf_name: shape for hf_name, shape in spec.hf_shapes.items() if hf_name in hf_names}
    target_segments = tuple(segment for segment in hf_side(spec).segments if segment.hf_name in hf_names)
    target = Side(target_segments, shapes, dict.fromkeys(shapes, (0,)))
    return compile_plan(spec, Side(segments, all_stages.shapes, all_stages.holders), target)


def _boxes(side: Side) -> dict[str, set[Any]]:
    boxes: dict[str, set[Any]] = {}
    for segment in side.segments:
        boxes.setdefault(segment.hf_name, set()).add(segment.box)
    return boxes
