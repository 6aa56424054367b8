"""AutoBridge: one object that knows a model in Hugging Face and in Megatron form and moves its weights between the two."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from mbridge_rl.adapter_bridge import LiveAdapterBridge
from mbridge_rl.bridges import Numerics, model_spec
from mbridge_rl.core import virtual
from mbridge_rl.core.errors import LayoutError, StateMismatchError
from mbridge_rl.core.interleaved_experts import with_interleaved_experts
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.plan import Plan, compile_plan
from mbridge_rl.core.quantize import Fp8
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.importing import import_stream
from mbridge_rl.distributed.rank_files import Weights, weights_of_source
from mbridge_rl.distributed.saving import save_together
from mbridge_rl.distributed.stream import DEFAULT_BUCKET_BYTES, TensorStream, Transport
from mbridge_rl.distributed.verify import Digests, differing, digests_of_model, digests_of_side
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.config import copy_companions, load_config, local_directory, save_config
from mbridge_rl.hf.module import HFModule
from mbridge_rl.hf.peft import read_lora_config
from mbridge_rl.hf.quantization import quantization_of, require_supported
from mbridge_rl.hf.source import HfSource, HfState, checked_state, has_own_output_layer, open_source, spelled_as_in
from mbridge_rl.hf.state import Contiguous
from mbridge_rl.hf.tied import untied
from mbridge_rl.hf.writer import DEFAULT_SHARD_BYTES, StagingDirectory, plan_files
from mbridge_rl.quantized_bridge import LiveQuantizedBridge

if TYPE_CHECKING:
    from mbridge_rl.megatron.parameters import LiveParameters

_log = logging.getLogger(__name__)

_PREPARED_STREAMS = 4  # how many are cached for the next export with the same arguments; each may hold shared memory

Shards = Mapping[int, Mapping[str, Tensor]]


class AutoBridge:
    """The bridge of one model: its Hugging Face config, and the mapping that follows from it.

    Attributes:
        hf_config: the Transformers config. If the config of a checkpoint says that the model is tied, but its output layer is
            another tensor than its embedding, `hf_config` and `spec` are those of an untied model.
        spec: the spec of the model, from which both ends are planned (`core.model.ModelSpec`).
        directory: the checkpoint of the bridge; `None` if it was made from a config alone.
    """

    def __init__(
        self,
        hf_config: Any,
        directory: Path | None = None,
        *,
        mtp: bool = False,
        numerics: Numerics = "transformers",
        glu_interleave: int | None = None,
    ) -> None:
        if quantization := quantization_of(hf_config):
            require_supported(quantization)
        tied = spelled_as_in(model_spec(hf_config), directory)
        if directory is not None and has_own_output_layer(tied, hf_config, directory):
            _log.warning(
                "%s: tie_word_embeddings is true, and the checkpoint's output layer differs from its embedding: the model is "
                "built with an output layer of its own, as Transformers and vLLM do. Exports keep it and say so",
                directory,
            )
            hf_config = untied(hf_config)
        self.hf_config = hf_config
        self.spec: ModelSpec = spelled_as_in(model_spec(hf_config, mtp=mtp, numerics=numerics), directory)
        if glu_interleave is not None:
            self.spec = with_interleaved_experts(self.spec, glu_interleave)
        self._warn_of_vllm()
        self.directory = directory
        self._export_plans: dict[ParallelLayout, Plan] = {}
        self._sides: dict[tuple[ParallelLayout, int], Side] = {}
        self._import_plans: dict[tuple[ParallelLayout, int], Plan] = {}
        self._streams: dict[tuple[object, ...], TensorStream] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        mtp: bool = False,
        numerics: Numerics = "transformers",
        glu_interleave: int | None = None,
    ) -> AutoBridge:
        """Makes the bridge of a checkpoint directory, or of a checkpoint on the Hugging Face hub.

        Args:
            path: the directory, or the name on the hub.
            mtp: carry multi-token-prediction layers (DeepSeek-V3, GLM-4.5): they are built frozen, imported, exported and
                saved. RL's forward passes, which give no labels, skip them. Without `mtp` they are neither built nor read, and
                a saved checkpoint lacks them: it can be served, but not with speculative decoding by its own layers.
            numerics: the arithmetic that the model follows where Transformers' class and vLLM's differ (docs/models.md lists
                the cases): `"vllm"` makes log-probabilities equal to those of a vLLM engine with these weights. The log warns
                of a model for which the two differ. Weights are the same in both cases.
            glu_interleave: Megatron's `moe_mlp_glu_interleave_size` (since 0.18): gate and up rows of experts alternate in
                blocks of so many rows in the Megatron model. Checkpoints are the same with and without it.

        Raises:
            UnsupportedModelError: there is no bridge for the architecture, or for a feature that the config asks for; or `mtp`
                is set and the model has no such layers.
            CheckpointError: the directory holds no readable config.
        """
        directory = local_directory(path)
        return cls(load_config(directory), directory, mtp=mtp, numerics=numerics, glu_interleave=glu_interleave)

    @classmethod
    def from_config(
        cls, hf_config: Any, *, mtp: bool = False, numerics: Numerics = "transformers", glu_interleave: int | None = None
    ) -> AutoBridge:
        """Makes the bridge of a Transformers config; weights are then given to `load_weights`. The arguments are those of
        `from_pretrained`."""
        return cls(hf_config, mtp=mtp, numerics=numerics, glu_interleave=glu_interleave)

    def _warn_of_vllm(self) -> None:
        for extra in self.spec.not_in_vllm:
            _log.warning(
                "%s is computed otherwise in Transformers and in vLLM (%s). This model follows Transformers; "
                'numerics="vllm" makes it equal to a vLLM engine',
                self.spec.architecture,
                extra,
            )

    def metadata(self, dtype: torch.dtype = torch.bfloat16) -> list[HFTensor]:
        """The name, dtype and shape of every HF tensor that an export in `dtype` yields, in its order. No weight is read."""
        return self.spec.hf_tensors(dtype)

    # Without processes: virtual ranks.

    def shard(self, hf_state: HfState | nn.Module, layout: ParallelLayout) -> dict[int, dict[str, Tensor]]:
        """The tensors of every Megatron rank of `layout`, `{rank: {megatron_name: tensor}}`, made in one process.

        Megatron names are global: layer and expert indices count over the complete model. The dtypes are those of `hf_state`,
        which is a state dict or a live Transformers module.

        Raises:
            StateMismatchError, LayoutError: the state or the layout does not fit the model.
        """
        if isinstance(hf_state, nn.Module):
            hf_state = HFModule(self.spec, hf_state)
            source, tensors, dtypes = hf_state.side, hf_state, hf_state.hf_dtypes()
        else:
            hf_state = checked_state(self.spec, self.hf_config, hf_state)
            source, tensors = hf_side(self.spec), Contiguous(hf_state)
            dtypes = {hf_name: hf_state[hf_name].dtype for hf_name in self.spec.hf_shapes if hf_name in hf_state}
        side = megatron_side(self.spec, layout)
        shards = {rank: virtual.allocate(side.on(rank), dtypes) for rank in range(layout.world_size)}
        virtual.run(compile_plan(self.spec, source, side), {0: tensors}, shards)
        return shards

    def unshard(self, shards: Shards, layout: ParallelLayout) -> dict[str, Tensor]:
        """The inverse of `shard`: the HF state dict that the ranks hold together.

        Raises:
            StateMismatchError: a rank or tensor is missing, unknown, or of another shape.
        """
        side = megatron_side(self.spec, layout)
        virtual.check(shards, {rank: side.on(rank) for rank in range(layout.world_size)})
        plan = compile_plan(self.spec, side, hf_side(self.spec))
        dtypes = {copy.hf_name: shards[copy.source_rank][copy.source.name].dtype for copy in plan.copies}
        hf_state = virtual.allocate(hf_side(self.spec), dtypes)
        virtual.run(plan, {rank: Contiguous(shard) for rank, shard in shards.items()}, {0: hf_state})
        return hf_state

    # With a live Megatron model.

    def build_model(self, layout: ParallelLayout | None = None, **options: Any) -> list[nn.Module]:
        """Builds this rank's Megatron `GPTModel` chunks for the parallel state that is running, with uninitialised weights.

        Args:
            layout: the layout; `None` takes it from Megatron's parallel state.
            options: options of `megatron.model.build_model` (dtype, sequence_parallel, grouped_experts, overrides, ddp).
        """
        from mbridge_rl.megatron.model import build_model

        return build_model(self.spec, layout, **options)

    @torch.no_grad()
    def load_weights(
        self,
        model: Sequence[nn.Module],
        source: HfSource | Iterable[tuple[str, Tensor]] | None = None,
        *,
        layout: ParallelLayout | None = None,
    ) -> None:
        """Fills this rank's parameters. Every rank reads only the bytes that it holds, and no payload is communicated. All
        ranks call it together, and fail together.

        With an optimizer that keeps fp32 masters, call its `reload_model_params()` afterwards.

        Args:
            model: this rank's model chunks.
            source: a checkpoint directory, an HF state dict, a live Transformers module, or a stream of `(hf_name, tensor)`
                (see `import_weights`); `None` means the checkpoint of the bridge.
            layout: the layout; `None` takes it from the model.

        Raises:
            CheckpointError, StateMismatchError: on all ranks: the source or the model does not match, which is checked before
                anything is written. A file that becomes unreadable while it is read leaves an incomplete model; the error says
                so.
        """
        from mbridge_rl.megatron.lora.adapter_side import require_replaceable_base
        from mbridge_rl.megatron.parameters import layout_of

        if source is not None and not isinstance(source, str | Path | Mapping | nn.Module):
            return self.import_weights(model, source, layout=layout)
        group = RankGroup()
        with group.fail_together():
            require_replaceable_base(model)
            hf_state = open_source(self.spec, self.hf_config, self._given_or_own(source))
            layout = _checked_layout(layout or layout_of(model, self.spec), group)
            live, side = self._live(model, layout, group.rank)
            if isinstance(hf_state, HFModule):
                plan = compile_plan(self.spec, hf_state.side, side)
            else:
                plan = self._import_plan(layout, group.rank, side)
        targets = {name: live.stored(name) for name in live}
        on_one_machine = group.on_one_machine
        with group.fail_together():
            if isinstance(hf_state, Checkpoint):
                hf_state.load(plan, targets, read_ahead=on_one_machine)
            else:
                virtual.run(plan, {0: hf_state}, {group.rank: targets})

    @torch.no_grad()
    def import_weights(
        self,
        model: Sequence[nn.Module],
        stream: Iterable[tuple[str, Tensor]],
        *,
        in_place: bool = False,
        layout: ParallelLayout | None = None,
    ) -> None:
        """Fills this rank's parameters from a stream of complete HF tensors in any order, one at a time: the inverse of
        `export_weights`. Every rank feeds its own stream of the same tensors. All ranks call it together, and fail together.

        Args:
            model: this rank's model chunks.
            stream: `(hf_name, tensor)`; names, shapes and dtypes are checked as they arrive.
            in_place: `False` collects the tensors in host memory, as many bytes as this rank's parameters, and moves them into
                the model when every rank has all of them, so that a stream that fails does not change the model. `True` needs
                no such memory, and a stream that fails leaves a mixture of old and new tensors; the error says how many.
            layout: the layout; `None` takes it from the model.

        Raises:
            StateMismatchError: on all ranks: a tensor is unknown, repeated, of another shape or not floating point, or the
                stream ended before all tensors arrived. Errors of the stream itself are raised, too.
        """
        from mbridge_rl.megatron.lora.adapter_side import require_replaceable_base
        from mbridge_rl.megatron.parameters import layout_of

        group = RankGroup()
        with group.fail_together():
            require_replaceable_base(model)
            layout = _checked_layout(layout or layout_of(model, self.spec), group)
            live, side = self._live(model, layout, group.rank)
            plan = self._import_plan(layout, group.rank, side)
        import_stream(self.spec, plan, {name: live.stored(name) for name in live}, stream, group, in_place=in_place)

    def export_weights(
        self,
        model: Sequence[nn.Module],
        *,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        ranks: Sequence[int] | None = None,
        transport: Transport = "auto",
        merge_adapters: bool = True,
        layout: ParallelLayout | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Streams `(hf_name, tensor)`, complete tensors in checkpoint order. The consumer may keep each tensor; it is on the
        CPU, or on the GPU if NCCL carries it.

        All ranks must iterate to the end, in lockstep; a rank that stops earlier makes the others raise. The first export with
        given arguments plans the transfer and compares the plan with the other ranks; later ones only move bytes.

        Args:
            model: this rank's model chunks.
            dtype: the dtype of the yielded tensors; `None` means the model's.
            bucket_bytes: bytes of a bucket. The extra memory is at most two buckets beside the tensor that is yielded, whatever
                the size of the model and of its tensors. Shared memory uses less: two slots for all ranks of the machine
                together.
            ranks: the ranks that receive; `None` means all. The others only contribute, and yield nothing.
            transport: `"shared_memory"`, `"collective"` (torch.distributed), or `"auto"`: shared memory if all ranks share a
                machine and hold their parameters on the CPU.
            merge_adapters: `False` yields the base weights without the adapters.
            layout: the layout; `None` takes it from the model.

        Raises:
            StateMismatchError, SyncError: on all ranks, before anything travels: the model is not the one of the mapping, or
                ranks disagree about the plan or the arguments. SyncError: a rank failed, left, or is missing.
        """
        from mbridge_rl.megatron.parameters import layout_of, model_dtype

        group = RankGroup()
        with group.fail_together():
            layout = _checked_layout(layout or layout_of(model, self.spec), group)
            live, _ = self._live(model, layout, group.rank)
            plan = self.export_plan(layout)
        arguments = (dtype or model_dtype(model), bucket_bytes, None if ranks is None else tuple(ranks), transport)
        tensors = live if merge_adapters else {name: live.stored(name) for name in live}
        yield from self._stream(layout, plan, group, live, arguments).run(tensors)

    def _stream(
        self, layout: ParallelLayout, plan: Plan, group: RankGroup, live: LiveParameters, arguments: tuple[Any, ...]
    ) -> TensorStream:
        """The prepared export with these arguments; each process group has its own."""
        dtype, bucket_bytes, ranks, transport = arguments
        device = next((live.stored(name).device for name in live), group.device)
        key = (layout, group.identity, device, *arguments)
        # If ranks have different arguments, or only some of them have prepared the export, all prepare it again.
        checksum = 1 + zlib.crc32(repr((layout, arguments)).encode()) % (1 << 20)
        if not group.all_same(checksum if key in self._streams else 0) and key in self._streams:
            self._streams.pop(key).close()
        if key not in self._streams:
            if len(self._streams) >= _PREPARED_STREAMS:
                self._streams.pop(next(iter(self._streams))).close()
            dtypes = self.spec.hf_dtypes(dtype)
            self._streams[key] = TensorStream(
                plan, dtypes, group, device=device, bucket_bytes=bucket_bytes, ranks=ranks, transport=transport
            )
        return self._streams[key]

    @torch.no_grad()
    def export_to_module(
        self,
        model: Sequence[nn.Module],
        hf_module: nn.Module | None,
        *,
        ranks: Sequence[int] | None = None,
        in_place: bool = False,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        transport: Transport = "auto",
        layout: ParallelLayout | None = None,
    ) -> None:
        """Fills a live Transformers module: the inverse of `load_weights(model, hf_module)`. Adapters are merged. All ranks
        call it together, and fail together. Tensors stream as in `export_weights` and are cast to the module's dtypes.

        Args:
            model: this rank's model chunks.
            hf_module: this rank's module; `None` on ranks that receive nothing.
            ranks: the ranks whose modules are filled; `None` means every rank. The others only contribute.
            in_place: as in `import_weights`: `False` needs the module's size once more in host memory and changes the module
                only when all tensors have arrived on all ranks.
            bucket_bytes: as in `export_weights`.
            transport: as in `export_weights`.
            layout: the layout; `None` takes it from the model.

        Raises:
            StateMismatchError: on all ranks, before anything travels: a module belongs to another model, or a rank that
                receives has none.
            StateMismatchError, SyncError: as `export_weights`.
        """
        group = RankGroup()
        receives = ranks is None or group.rank in ranks
        with group.fail_together():
            if receives is not isinstance(hf_module, nn.Module):
                raise StateMismatchError(
                    f"rank {group.rank} {'receives and has no module' if receives else 'receives nothing and has a module'}: "
                    "give a module to the ranks that receive, and None to the others"
                )
            module = HFModule(self.spec, hf_module) if hf_module is not None else None
            plan = compile_plan(self.spec, hf_side(self.spec), module.side) if module is not None else None
        stream = self.export_weights(model, bucket_bytes=bucket_bytes, ranks=ranks, transport=transport, layout=layout)
        if module is None or plan is None:
            with group.fail_together():
                deque(stream, maxlen=0)
        else:
            targets = {name: module[name] for name in module.side.shapes}
            import_stream(self.spec, plan, targets, stream, group, in_place=in_place)

    @torch.no_grad()
    def verify(
        self,
        first: HfSource | Sequence[nn.Module],
        second: HfSource | Sequence[nn.Module],
        *,
        dtype: torch.dtype | None = None,
        layout: ParallelLayout | None = None,
    ) -> list[str]:
        """The names of the HF tensors that differ between two sides, bit for bit, by digest; `[]` proves the sides equal. Each
        side is read in its place; of replicas, the one that an export reads. A few bytes per tensor travel between ranks.

        Args:
            first: a Megatron model (its chunks; then all ranks call this together, and share the reading of files), the
                directory of a checkpoint or of Megatron ranks (`mbridge-rl convert`), a state dict, or a live Transformers
                module.
            second: the other side.
            dtype: the dtype to which both are cast first; `None` means that of the Megatron model, and no cast if there is
                none.
            layout: the layout; `None` takes it from the Megatron model.
        """
        from mbridge_rl.megatron.parameters import layout_of, model_dtype

        models = [side for side in (first, second) if _is_megatron(side)]
        dtype = dtype or (model_dtype(models[0]) if models else None)
        group = RankGroup() if models else None
        with group.fail_together() if group is not None else contextlib.nullcontext():
            if group is not None:
                layout = _checked_layout(layout or layout_of(models[0], self.spec), group)
            opened = [
                side if _is_megatron(side) else weights_of_source(self.spec, self.hf_config, side) for side in (first, second)
            ]
        digests: list[Digests] = []
        for given, side in zip((first, second), opened, strict=True):
            if isinstance(side, Weights):
                dtypes = None if dtype is None else self.spec.hf_dtypes(dtype)
                sharing = group if isinstance(given, str | Path) else None
                digests.append(digests_of_side(self.spec, side.side, side.tensors, dtypes, sharing))
            else:
                digests.append(digests_of_model(self.spec, side, self.export_plan(layout), layout, dtype, group))
        optional = self.spec.repeated_hf_names - (digests[0].keys() & digests[1].keys())
        return [hf_name for hf_name in differing(*digests) if hf_name not in optional]

    @torch.no_grad()
    def save_pretrained(
        self,
        model: Sequence[nn.Module],
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        durable: bool = True,
        layout: ParallelLayout | None = None,
    ) -> None:
        """Writes a Hugging Face checkpoint (weights, config, tokenizer files). Every rank writes its own bytes into the files,
        and nothing is gathered. All ranks need the same file system. They call this together, and fail together.

        The checkpoint is built in a hidden directory beside `directory`, which replaces `directory` when it is complete; an
        interrupted save leaves an older checkpoint as it was.

        Args:
            model: this rank's model chunks.
            directory: the directory of the checkpoint.
            dtype: the dtype of the saved weights; `None` means the model's.
            shard_bytes: bytes of one file.
            durable: return only when the bytes are on the disk, so that a power failure does not undo the save.
            layout: the layout; `None` takes it from the model.

        Raises:
            CheckpointError: on all ranks: the disk is full, or the directory cannot be written. An older checkpoint does not
                change.
        """
        from mbridge_rl.megatron.parameters import layout_of, model_dtype

        group = RankGroup()
        with group.fail_together():
            layout = _checked_layout(layout or layout_of(model, self.spec), group)
            live, _ = self._live(model, layout, group.rank)
            plan = self.export_plan(layout)
            dtype = dtype or model_dtype(model)
            files = plan_files(self.metadata(dtype), shard_bytes)
        staging = StagingDirectory(directory, files, durable=durable)
        save_together(staging, plan, live, group, lambda: self._write_companions(staging.path, dtype))
        _log.info("saved %s to %s", self.spec.architecture, staging.directory)

    @torch.no_grad()
    def export_quantized_weights(
        self,
        model: Sequence[nn.Module],
        scheme: Fp8,
        *,
        dtype: torch.dtype | None = None,
        ranks: Sequence[int] | None = None,
        transport: Transport = "auto",
    ) -> Iterator[tuple[str, Tensor]]:
        """As `export_weights`, with the weights of linears in fp8, each followed by its scales. Every rank quantizes the
        tensors that it holds, so half the bytes travel. The result is bit for bit that of a single process.

        Args:
            model: this rank's model chunks.
            scheme: the quantization.
            dtype: the dtype of the tensors that are not quantized; `None` means the model's.
            ranks: as in `export_weights`.
            transport: as in `export_weights`.
        """
        yield from LiveQuantizedBridge(self.spec, model, scheme, dtype).export(ranks, transport)

    @torch.no_grad()
    def save_quantized(
        self,
        model: Sequence[nn.Module],
        directory: str | Path,
        scheme: Fp8,
        *,
        dtype: torch.dtype | None = None,
        durable: bool = True,
    ) -> None:
        """As `save_pretrained`, in fp8; the checkpoint's config.json has the quantization."""
        LiveQuantizedBridge(self.spec, model, scheme, dtype).save(directory, self._write_companions, durable=durable)

    @torch.no_grad()
    def export_adapter_weights(
        self,
        model: Sequence[nn.Module],
        *,
        dtype: torch.dtype | None = None,
        ranks: Sequence[int] | None = None,
        transport: Transport = "auto",
    ) -> Iterator[tuple[str, Tensor]]:
        """As `export_weights`, for the adapters alone: streams `(PEFT name, tensor)`, full factors, `B` without the scale."""
        yield from LiveAdapterBridge(self.spec, model).export(dtype, ranks, transport)

    @torch.no_grad()
    def save_adapter(
        self, model: Sequence[nn.Module], directory: str | Path, *, dtype: torch.dtype | None = None, durable: bool = True
    ) -> None:
        """Writes the adapters in PEFT's format; every rank writes its own bytes. All ranks call it together, and fail together.

        Raises:
            StateMismatchError: the model has no adapters. CheckpointError: the disk is full, or the directory cannot be
                written; an older adapter does not change.
        """
        base = None if self.directory is None else str(self.directory)
        LiveAdapterBridge(self.spec, model).save(directory, base, dtype=dtype, durable=durable)

    def adapter_config(self, directory: str | Path) -> LoRAConfig:
        """The config with which `megatron.lora.attach.add_lora` attaches the PEFT adapter of `directory` for `load_adapter`.

        Raises:
            CheckpointError, UnsupportedModelError, StateMismatchError: as `hf.peft.read_lora_config`.
        """
        return read_lora_config(self.spec, directory)

    @torch.no_grad()
    def load_adapter(self, model: Sequence[nn.Module], source: str | Path | HfState) -> None:
        """Fills the adapters of `model` from a PEFT adapter (a directory, or its tensors by PEFT name). Every rank reads only
        the bytes that it holds. All ranks call it together, and fail together.

        With an optimizer that keeps fp32 masters, call its `reload_model_params()` afterwards.

        Raises:
            StateMismatchError: on all ranks, before anything is written: the model has no adapters, or others (linears, rank,
                scale), or the source has separate `A`s for parts that share one in the model. CheckpointError,
                UnsupportedModelError: as `adapter_config`.
        """
        LiveAdapterBridge(self.spec, model).load(source)

    def export_plan(self, layout: ParallelLayout) -> Plan:
        """The plan from the Megatron ranks of `layout` to HF tensors; replicas share the work."""
        if layout not in self._export_plans:
            self._export_plans[layout] = compile_plan(self.spec, megatron_side(self.spec, layout), hf_side(self.spec))
        return self._export_plans[layout]

    def _live(self, model: Sequence[nn.Module], layout: ParallelLayout, rank: int) -> tuple[LiveParameters, Side]:
        """This rank's live parameters, checked against its side, which is computed once, and that side."""
        from mbridge_rl.megatron.parameters import live_side

        if (layout, rank) not in self._sides:
            self._sides[layout, rank] = megatron_side(self.spec, layout, rank)
        return live_side(model, self.spec, layout, rank, self._sides[layout, rank])

    def _import_plan(self, layout: ParallelLayout, rank: int, side: Side) -> Plan:
        """The plan from HF tensors to this rank's tensors."""
        if (layout, rank) not in self._import_plans:
            self._import_plans[layout, rank] = compile_plan(self.spec, hf_side(self.spec), side)
        return self._import_plans[layout, rank]

    def _given_or_own(self, given: HfSource | None) -> HfSource:
        source = self.directory if given is None else given
        if source is None:
            raise StateMismatchError("this bridge came from a bare config: give load_weights a source")
        return source

    def _write_companions(self, path: Path, dtype: torch.dtype) -> None:
        save_config(self.hf_config, path, dtype)
        if self.directory is not None:
            copy_companions(self.directory, path)


def _is_megatron(side: HfSource | Sequence[nn.Module]) -> TypeGuard[Sequence[nn.Module]]:
    return not isinstance(side, str | Path | Mapping | nn.Module)


def _checked_layout(layout: ParallelLayout, group: RankGroup) -> ParallelLayout:
    """Returns `layout` if it has as many ranks as `group`; the tensors of missing ranks would be left out.

    Raises:
        LayoutError: it has another number of ranks.
    """
    if layout.world_size != group.size:
        raise LayoutError(f"{layout} has {layout.world_size} ranks, {group.size} are running: give the layout that is running")
    return layout
