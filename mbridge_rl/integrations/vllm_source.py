"""A live Megatron model as vLLM's own `WeightSource`, so that vLLM's backends (`nccl`, `ipc`, `sharded_rdt`) can send it.

These backends send full HF tensors, gathered on trainer ranks; `sync.weight_sync.WeightSync` sends shards, in a transaction.
This module is for deployments that already use one of vLLM's backends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.core.errors import SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.plan import Plan, compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.stream import DEFAULT_BUCKET_BYTES, TensorStream
from mbridge_rl.megatron.parameters import LiveParameters, layout_of, live_side, model_dtype
from mbridge_rl.sync.vllm.versions import Metadata, param_meta, require_vllm

require_vllm("a source for vLLM's weight transfer needs vLLM")
from vllm.distributed.weight_transfer.base import WeightSource, layerwise_groups  # noqa: E402

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
        self._held: frozenset[str] | None = None
        owners: Mapping[str, Sequence[int]] = {} if ranks is None else dict.fromkeys(spec.hf_shapes, tuple(ranks))
        group = world
        if by_stage:
            stages = _ranks_by_stage(self._layout, world)
            group, ranks_of_stage = _stage_group(stages, self._layout, world)
            plan = _stage_plan(spec, self._layout, ranks_of_stage)
            self._held = frozenset(plan.hf_shapes)
            owners = _owners(spec, self._layout, stages)
        else:
            plan = compile_plan(spec, megatron_side(spec, self._layout), hf_side(spec))
        tensors = _in_group_order(spec.hf_tensors(dtype or model_dtype(model)))
        self._metadata = Metadata(param_meta(t.hf_name, t.dtype, tuple(t.shape), owners.get(t.hf_name)) for t in tensors)
        order = [metadata.name for metadata in self._metadata if metadata.name in plan.hf_shapes]
        live = self._live()
        self._stream = TensorStream(
            replace(plan, hf_shapes={name: plan.hf_shapes[name] for name in order}),
            {metadata.name: metadata.dtype for metadata in self._metadata},
            group,
            device=next((live.stored(name).device for name in live), group.device),
            bucket_bytes=bucket_bytes,
            ranks=ranks,
        )

    @cached_property
    def metadata(self) -> Metadata:  # type: ignore[override]
        """The metadata of the complete model, on every rank. It follows from the mapping, and nothing is exported for it."""
        return self._metadata

    def iter_full(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(hf_name, tensor)` of what this rank owns, in the order of `metadata`. vLLM iterates so since 0.33."""
        yield from self._stream.run(self._live())

    def held_names(self) -> frozenset[str] | None:
        return self._held

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:  # type: ignore[override]
        """Yields `(hf_name, tensor)` in the order of `metadata`; by stage in the order of `groups`, with `None` for tensors of
        other stages. vLLM iterates so before 0.33."""
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


def _in_group_order(tensors: Iterable[HFTensor]) -> list[HFTensor]:
    """The tensors in the order of vLLM's groups of layers, in which vLLM expects all tensors."""
    by_name = {tensor.hf_name: tensor for tensor in tensors}
    return [by_name[hf_name] for group in layerwise_groups(list(by_name)) for hf_name in group]


def _ranks_by_stage(layout: ParallelLayout, world: RankGroup) -> list[list[int]]:
    stages: list[list[int]] = [[] for _ in range(layout.pp)]
    for rank in range(world.size):
        stages[layout.coordinates(rank).pp].append(rank)
    return stages


def _stage_group(stages: Sequence[Sequence[int]], layout: ParallelLayout, world: RankGroup) -> tuple[RankGroup, Sequence[int]]:
    """The group of this rank's stage, and its ranks. All ranks call it together, since torch.distributed makes every group on
    all ranks."""
    if len(stages) == 1:
        return world, stages[0]
    groups = [dist.new_group(list(ranks)) for ranks in stages]
    stage = layout.coordinates(world.rank).pp
    return RankGroup(groups[stage]), stages[stage]


def _owners(spec: ModelSpec, layout: ParallelLayout, stages: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """The ranks of all stages that hold a tensor, by `hf_name`."""
    owners: dict[str, list[int]] = {}
    for ranks in stages:
        for hf_name in _stage_plan(spec, layout, ranks).hf_shapes:
            owners.setdefault(hf_name, []).extend(ranks)
    return owners


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
