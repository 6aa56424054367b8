"""AutoBridge: one object that knows a model on both sides and moves its weights between them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.bridges import model_spec
from mbridge_rl.core import virtual
from mbridge_rl.core.errors import StateMismatchError, listed
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.plan import Plan, compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.config import copy_companions, load_config, local_directory, save_config
from mbridge_rl.hf.state import check_hf_state
from mbridge_rl.hf.writer import DEFAULT_SHARD_BYTES, StagingDirectory, plan_files
from mbridge_rl.sync.group import RankGroup
from mbridge_rl.sync.stream import DEFAULT_BUCKET_BYTES, stream_tensors

_log = logging.getLogger(__name__)

HfState = Mapping[str, Tensor]
Shards = Mapping[int, Mapping[str, Tensor]]


class AutoBridge:
    """The bridge of one model: its Hugging Face config, and the mapping that follows from it.

    Attributes:
        hf_config: the Transformers config.
        spec: what both ends know of the model (`core.model.ModelSpec`).
        directory: the checkpoint that it came from, `None` for a bare config.
    """

    def __init__(self, hf_config: Any, directory: Path | None = None) -> None:
        self.hf_config = hf_config
        self.spec: ModelSpec = model_spec(hf_config)
        self.directory = directory
        self._export_plans: dict[ParallelLayout, Plan] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AutoBridge:
        """From a checkpoint directory, or the name of one on the Hugging Face hub.

        Raises:
            UnsupportedModelError: no bridge for the architecture, or for a feature that the config asks for.
            CheckpointError: the directory holds no readable config.
        """
        directory = local_directory(path)
        return cls(load_config(directory), directory)

    @classmethod
    def from_config(cls, hf_config: Any) -> AutoBridge:
        """From a Transformers config alone; weights are then given to `load_weights`."""
        return cls(hf_config)

    def metadata(self, dtype: torch.dtype = torch.bfloat16) -> list[HFTensor]:
        """Name, dtype and shape of every HF tensor that an export in `dtype` yields, in its order; no weight is touched."""
        return [HFTensor(hf_name, dtype, shape) for hf_name, shape in self.spec.hf_shapes.items()]

    # Without processes: virtual ranks.

    def shard(self, hf_state: HfState, layout: ParallelLayout) -> dict[int, dict[str, Tensor]]:
        """What every Megatron rank of `layout` holds: `{rank: {megatron_name: tensor}}`, in one process.

        Megatron names are global: layer and expert indices count over the whole model. Dtypes are those of `hf_state`.

        Raises:
            StateMismatchError, LayoutError: the state or the layout does not fit the model.
        """
        check_hf_state(self.spec, hf_state, "the given state dict")
        side = megatron_side(self.spec, layout)
        dtypes = {hf_name: hf_state[hf_name].dtype for hf_name in self.spec.hf_shapes}
        shards = {rank: virtual.allocate(side.on(rank), dtypes) for rank in range(layout.world_size)}
        plan = compile_plan(self.spec, hf_side(self.spec), side)
        virtual.run(plan, {0: _Contiguous(hf_state)}, shards)
        return shards

    def unshard(self, shards: Shards, layout: ParallelLayout) -> dict[str, Tensor]:
        """The inverse of `shard`: the HF state dict that the ranks hold together.

        Raises:
            StateMismatchError: a rank or tensor that is missing, left over, or of another shape.
        """
        side = megatron_side(self.spec, layout)
        _check_shards(shards, {rank: side.on(rank) for rank in range(layout.world_size)})
        plan = compile_plan(self.spec, side, hf_side(self.spec))
        dtypes = {copy.hf_name: shards[copy.source_rank][copy.source.name].dtype for copy in plan.copies}
        hf_state = virtual.allocate(hf_side(self.spec), dtypes)
        virtual.run(plan, {rank: _Contiguous(shard) for rank, shard in shards.items()}, {0: hf_state})
        return hf_state

    # With a live Megatron model.

    def build_model(self, layout: ParallelLayout | None = None, **options: Any) -> list[nn.Module]:
        """This rank's Megatron `GPTModel` chunks for the parallel state that is running, with uninitialised HF weights.

        Args:
            layout: `None` asks Megatron's parallel state.
            options: see `megatron.model.build_model` (dtype, sequence_parallel, grouped_experts, overrides, ddp).
        """
        from mbridge_rl.megatron.model import build_model

        return build_model(self.spec, layout, **options)

    @torch.no_grad()
    def load_weights(
        self,
        model: Sequence[nn.Module],
        source: str | Path | HfState | Iterable[tuple[str, Tensor]] | None = None,
        *,
        layout: ParallelLayout | None = None,
    ) -> None:
        """Fills this rank's parameters. Every rank reads only the bytes that it keeps; nothing is communicated.

        With an optimizer that keeps fp32 masters, call its `reload_model_params()` afterwards.

        Args:
            source: a checkpoint directory, an HF state dict, or an iterable of `(hf_name, tensor)`; `None` means the
                checkpoint that the bridge came from.

        Raises:
            CheckpointError, StateMismatchError: the source or the model does not match; checked before anything is written.
        """
        from mbridge_rl.megatron.parameters import layout_of, live_side, world_rank

        hf_state, where = self._opened(source)
        check_hf_state(self.spec, hf_state, where)
        layout, rank = layout or layout_of(model, self.spec), world_rank()
        live, side = live_side(model, self.spec, layout, rank)
        plan = compile_plan(self.spec, hf_side(self.spec), side)
        virtual.run(plan, {0: _Contiguous(hf_state)}, {rank: {name: live.base(name) for name in live}})

    def export_weights(
        self,
        model: Sequence[nn.Module],
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        layout: ParallelLayout | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Streams `(hf_name, tensor)`, whole tensors in checkpoint order, on every rank; adapters are merged.

        All ranks must iterate to the end, in lockstep. Few broadcasts carry packed buckets; extra memory is bounded by two
        buckets (or two of the largest tensor) whatever the size of the model.

        Args:
            dtype: of the yielded tensors; `None` means the model's.
        """
        from mbridge_rl.megatron.parameters import layout_of, live_side, model_dtype

        layout, group = layout or layout_of(model, self.spec), RankGroup()
        live, _ = live_side(model, self.spec, layout, group.rank)
        yield from stream_tensors(self.export_plan(layout), live, group, dtype or model_dtype(model), bucket_bytes)

    @torch.no_grad()
    def save_pretrained(
        self,
        model: Sequence[nn.Module],
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        layout: ParallelLayout | None = None,
    ) -> None:
        """Writes a Hugging Face checkpoint (weights, config, tokenizer files). Every rank writes its own bytes into the files;
        nothing is gathered, and the files take their names only when all are complete. Needs one file system for all ranks.
        """
        from mbridge_rl.megatron.parameters import layout_of, live_side, model_dtype

        layout, group = layout or layout_of(model, self.spec), RankGroup()
        dtype = dtype or model_dtype(model)
        live, _ = live_side(model, self.spec, layout, group.rank)
        plan = self.export_plan(layout)
        staging = StagingDirectory(directory, plan_files(plan.hf_shapes, dtype, shard_bytes))
        group.first_rank_does(staging.create)
        files = staging.tensors(dtype)
        for copy in plan.from_rank(group.rank):
            copy.target.of(files[copy.target.name], copy.shape).copy_(copy.source.of(live[copy.source.name], copy.shape))
        group.barrier()
        group.first_rank_does(lambda: self._publish(staging, dtype))

    def export_plan(self, layout: ParallelLayout) -> Plan:
        """From the Megatron ranks of `layout` to whole HF tensors, the work shared between replicas."""
        if layout not in self._export_plans:
            self._export_plans[layout] = compile_plan(self.spec, megatron_side(self.spec, layout), hf_side(self.spec))
        return self._export_plans[layout]

    def _publish(self, staging: StagingDirectory, dtype: torch.dtype) -> None:
        save_config(self.hf_config, staging.path, dtype)
        if self.directory is not None:
            copy_companions(self.directory, staging.path)
        staging.publish()
        _log.info("saved %s to %s", self.spec.architecture, staging.directory)

    def _opened(self, source: str | Path | HfState | Iterable[tuple[str, Tensor]] | None) -> tuple[HfState, str]:
        if source is None:
            if self.directory is None:
                raise StateMismatchError("this bridge came from a bare config: give load_weights a source")
            source = self.directory
        if isinstance(source, str | Path):
            directory = local_directory(source)
            return Checkpoint(directory), str(directory)
        return (source if isinstance(source, Mapping) else dict(source)), "the given source"


class _Contiguous(Mapping[str, Tensor]):
    """Tensors that are made contiguous when they are read; mapped files already are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_shards(shards: Shards, sides: Mapping[int, Side]) -> None:
    if shards.keys() != sides.keys():
        raise StateMismatchError(f"the layout has ranks 0..{len(sides) - 1}, the shards are of ranks {sorted(shards)}")
    for rank, side in sides.items():
        missing, extra = side.shapes.keys() - shards[rank].keys(), shards[rank].keys() - side.shapes.keys()
        if missing or extra:
            raise StateMismatchError(f"rank {rank}: missing [{listed(missing)}], unexpected [{listed(extra)}]")
        for name, shape in side.shapes.items():
            if tuple(shards[rank][name].shape) != shape:
                raise StateMismatchError(
                    f"rank {rank}: {name} has shape {list(shards[rank][name].shape)}, the layout says {list(shape)}"
                )
