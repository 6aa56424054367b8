"""Megatron's shards as files: one safetensors file for each rank, and `layout.json`, which describes them.

A conversion goes from any such directory, or a Hugging Face checkpoint, to another, by one plan for each file that is written.
Sources are mapped and read when they are needed; no more than one rank's tensors of the target are in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mbridge_rl.core import virtual
from mbridge_rl.core.errors import CheckpointError, StateMismatchError, listed
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.hf.module import HFModule
from mbridge_rl.hf.proof import READ_BACK_ADVICE, same_bits
from mbridge_rl.hf.publish import Replacement
from mbridge_rl.hf.source import HfSource, open_source
from mbridge_rl.hf.writer import DEFAULT_SHARD_BYTES, StagingDirectory, plan_files

LAYOUT_FILE = "layout.json"
_FORMAT = "mbridge_rl Megatron ranks 1"


@dataclass(frozen=True)
class Weights:
    """The source of a conversion: a side, the tensors of its ranks, and the dtype of each HF tensor."""

    side: Side
    tensors: Mapping[int, Mapping[str, Tensor]]
    dtypes: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Written:
    """One file that a conversion has written, with the number of its tensors and their bytes."""

    name: str
    tensors: int
    nbytes: int


WriteCompanions = Callable[[Path], None]


def is_rank_files(directory: Path) -> bool:
    return (directory / LAYOUT_FILE).is_file()


def weights_of_source(spec: ModelSpec, hf_config: Any, source: HfSource) -> Weights:
    """The weights of a source that is not a live Megatron model, as a side and its tensors.

    Raises:
        CheckpointError, StateMismatchError: as `open_rank_files` and `hf.source.open_source`.
    """
    if isinstance(source, str | Path) and is_rank_files(Path(source)):
        return open_rank_files(Path(source), spec)[0]
    opened = open_source(spec, hf_config, source)
    if isinstance(opened, HFModule):
        return Weights(opened.side, {0: opened}, opened.hf_dtypes())
    side = hf_side(spec)
    segments = tuple(segment for segment in side.segments if segment.hf_name in opened)
    return Weights(replace(side, segments=segments), {0: opened}, {})


def of_hf_state(spec: ModelSpec, hf_state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> Weights:
    """The weights of a Hugging Face checkpoint or state dict. The caller has checked that they are those of the model."""
    return Weights(hf_side(spec), {0: _LastCached(hf_state)}, dtypes)


def open_rank_files(directory: Path, spec: ModelSpec) -> tuple[Weights, ParallelLayout]:
    """Opens the files that `write_rank_files` wrote; reads their headers and compares them with the model.

    Raises:
        CheckpointError: a file is missing or broken, or `layout.json` is not one that this library wrote. StateMismatchError:
            the files belong to another model, or a rank's tensors are not those of the layout.
    """
    layout = _read_layout(directory, spec)
    side = megatron_side(spec, layout)
    files = {rank: _RankFile(directory / _file_name(rank)) for rank in range(layout.world_size)}
    for rank, file in files.items():
        file.check(side.on(rank).shapes)
    dtypes = {segment.hf_name: files[segment.ranks[0]].dtype(segment.local_name) for segment in side.segments}
    return Weights(side, files, dtypes), layout


def write_rank_files(
    spec: ModelSpec, source: Weights, directory: Path, layout: ParallelLayout, write_companions: WriteCompanions
) -> Iterator[Written]:
    """Writes every rank of `layout`, one after another; yields each file when it is written. The directory gets its name when
    all files are there.

    Args:
        spec: the spec of the model.
        source: the weights.
        directory: the new directory.
        layout: the layout of the ranks.
        write_companions: writes the other files of a checkpoint (config, tokenizer) into a directory, so that converting back
            needs no other source.

    Raises:
        LayoutError: the model cannot be cut this way. CheckpointError: the directory exists already, or cannot be written.
    """
    spec.validate(layout)
    replacement = Replacement(directory, only_new=True)
    directory = replacement.directory
    try:
        replacement.begin()
        staged = replacement.path
        for rank in range(layout.world_size):
            tensors = _shard(spec, source, layout, rank)
            save_file(tensors, staged / _file_name(rank), metadata={"format": "pt", "rank": str(rank)})
            _require_written(staged / _file_name(rank), tensors)
            yield Written(_file_name(rank), len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
        description = {
            "format": _FORMAT,
            "architecture": spec.architecture,
            "fingerprint": spec.fingerprint,
            "layout": asdict(layout),
        }
        (staged / LAYOUT_FILE).write_text(json.dumps(description, indent=2) + "\n")
        write_companions(staged)
        replacement.publish(durable=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} could not be written: {error}; nothing is left of it") from error
    finally:
        replacement.end()


def write_checkpoint(
    spec: ModelSpec,
    source: Weights,
    directory: Path,
    write_companions: WriteCompanions,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Iterator[Written]:
    """Writes a Hugging Face checkpoint, file by file and rectangle by rectangle; yields each file when it is written.

    Raises:
        CheckpointError: the directory exists already, or cannot be written.
    """
    files = plan_files(
        [HFTensor(hf_name, source.dtypes[hf_name], shape) for hf_name, shape in spec.hf_shapes.items()], shard_bytes
    )
    staging = StagingDirectory(directory, files, only_new=True)
    side = hf_side(spec)
    try:
        mapped = staging.create(mapped=True).mapped
        for file in files:
            plan = compile_plan(spec, source.side, _only(side, file.tensors))
            for copy in plan.copies:
                tensor = source.tensors[copy.source_rank][copy.source.name]
                staging.write(copy.target, copy.shape, copy.source.of(tensor, copy.shape), mapped=mapped)
            yield Written(file.name, len(file.tensors), file.nbytes)
        staging.prove(staging.finish())
        write_companions(staging.path)
        staging.publish()
    finally:
        staging.discard()


def _shard(spec: ModelSpec, source: Weights, layout: ParallelLayout, rank: int) -> dict[str, Tensor]:
    side = megatron_side(spec, layout, rank)
    tensors = virtual.allocate(side, source.dtypes)
    virtual.run(compile_plan(spec, source.side, side), source.tensors, {rank: tensors})
    return tensors


def _only(side: Side, names: Mapping[str, object]) -> Side:
    """The part of the Hugging Face side that has the tensors `names`."""
    segments = tuple(segment for segment in side.segments if segment.hf_name in names)
    shapes = {name: shape for name, shape in side.shapes.items() if name in names}
    return Side(segments, shapes, {name: side.holders[name] for name in shapes})


def _require_written(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads a file back.

    Raises:
        CheckpointError: it does not hold `tensors`, bit for bit.
    """
    file = _RankFile(path)
    for name, tensor in tensors.items():
        written = file.get(name)
        if written is None or not same_bits(written, tensor):
            raise CheckpointError(f"{path}: {name} reads back as something else than was written: {READ_BACK_ADVICE}")


def _file_name(rank: int) -> str:
    return f"rank-{rank:05}.safetensors"


def _read_layout(directory: Path, spec: ModelSpec) -> ParallelLayout:
    path = directory / LAYOUT_FILE
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        layout = ParallelLayout(**description["layout"]) if description["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no layout of Megatron ranks: {error!r}; convert the checkpoint again") from error
    if layout is None:
        raise CheckpointError(f"{path} has format {description['format']!r}, this version reads {_FORMAT!r}")
    if description["fingerprint"] != spec.fingerprint:
        raise StateMismatchError(
            f"{directory}: its files are another model's than its config.json describes (mapping {description['fingerprint']} "
            f"of {description['architecture']}, found {spec.fingerprint} of {spec.architecture}); was the config changed?"
        )
    return layout


class _RankFile(Mapping[str, Tensor]):
    """One rank's tensors by `megatron_name`, mapped from its file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing, though {LAYOUT_FILE} says that there is such a rank") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or corrupt ({error}); convert the checkpoint again") from error
        self._names = frozenset(self._file.keys())

    def __getitem__(self, megatron_name: str) -> Tensor:
        return self._file.get_tensor(megatron_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def dtype(self, megatron_name: str) -> torch.dtype:
        return self[megatron_name].dtype

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares the names and shapes of the tensors with `shapes`, those of the layout.

        Raises:
            StateMismatchError: they differ.
        """
        if self._names != shapes.keys():
            missing, extra = listed(shapes.keys() - self._names), listed(self._names - shapes.keys())
            raise StateMismatchError(
                f"{self._path} is not the one of this layout: it lacks [{missing}], it has besides [{extra}]"
            )
        for name, shape in shapes.items():
            file_shape = tuple(self._file.get_slice(name).get_shape())
            if file_shape != shape:
                raise StateMismatchError(f"{self._path}: {name} has shape {list(file_shape)}, the layout says {list(shape)}")


class _LastCached(Mapping[str, Tensor]):
    """Tensors that are costly to get (dequantized ones). The last one is cached, because its rectangles are read one after
    another."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, hf_name: str) -> Tensor:
        if self._last is None or self._last[0] != hf_name:
            self._last = (hf_name, self._tensors[hf_name].contiguous())
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
