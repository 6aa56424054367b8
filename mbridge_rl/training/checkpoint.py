"""Training checkpoints: weights, Adam's state, schedule, random states and the caller's own state, by Megatron's distributed
checkpointing. Every rank writes its own part, and any other layout can load it (`checkpoint_tensors`).

    checkpoints/step_00000012/           complete, or it would not have this name
    checkpoints/.step_00000013.partial/

A checkpoint is written beside its place and renamed when all ranks have written all of it: an interrupted save never looks like
a checkpoint. With adapters they alone are saved: the frozen base comes from where it came from.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from mbridge_rl.core.errors import CheckpointError, listed
from mbridge_rl.megatron.runtime import megatron_runtime
from mbridge_rl.sync.group import RankGroup
from mbridge_rl.training.checkpoint_tensors import KINDS, TrainerTensors
from mbridge_rl.training.optimizer_state import set_step_count
from mbridge_rl.training.random_state import derive_random_state, random_state, restore_random_state
from mbridge_rl.training.trainer import MegatronTrainer

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_ROOM = "room"  # for what the first rank writes at the end
_METADATA_BYTES = 512  # of one shard, at most
_DESCRIPTION = "trainer.json"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Attributes:
    step: that it was saved after.
    state: what the caller had saved with it.
    same_layout: whether random states were restored, too: they belong to ranks. Otherwise new ones follow from the run's seed
        and this step (`random_state.derive_random_state`).
    """

    step: int
    state: dict[str, Any]
    same_layout: bool


def save_checkpoint(
    trainer: MegatronTrainer,
    directory: str | Path,
    step: int,
    *,
    state: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Saves the trainer; all ranks call it together, and fail together. Needs one file system for all ranks.

    Args:
        directory: of the run's checkpoints.
        step: that was made last.
        state: the caller's own, the same on all ranks (a data loader's position, a sampler's weights): tensors, numbers, texts,
            and lists and dictionaries of them.
        keep: how many of the newest checkpoints stay; `None` keeps all.

    Returns:
        The checkpoint's own directory.

    Raises:
        CheckpointError: on all ranks: the step is saved already, or the disk is full or not writable. Older checkpoints are
            untouched.
    """
    trainer.require_loaded()
    directory, group = Path(directory), RankGroup()
    final = directory / f"step_{step:08d}"
    partial = directory / f".{final.name}.partial"
    with group.together():
        if group.rank == 0:
            _make_room(final, partial)
    with group.together(), megatron_runtime(), _Tried(f"cannot save {final}"):
        content = _content(trainer, dict(state or {}))
        if group.rank == 0:
            _take_room(content, partial, group.size)
    with group.together(), megatron_runtime(), _Tried(f"cannot save {final}"):
        _save(content, partial)
    with group.together():
        if group.rank == 0:
            _write_description(partial / _DESCRIPTION, trainer, step)
            _publish(partial, final)
            _remove_old(directory, keep)
    _log.info("saved step %d to %s", step, final)
    return final


def load_checkpoint(trainer: MegatronTrainer, checkpoint: str | Path) -> LoadedCheckpoint:
    """Puts a checkpoint into the trainer, which may have another layout, optimizer sharding or dtype than the one that saved
    it; all ranks call it together, and fail together.

    A reference policy that is a copy of weights is not in it: load the initial weights, `snapshot_reference`, then this.

    Args:
        checkpoint: its own directory, or the directory of a run's checkpoints, of which the newest is taken.

    Raises:
        CheckpointError: on all ranks: there is none, or it is of another model or of other adapters (nothing was changed); or
            a file cannot be read (then weights and optimizer are incomplete).
    """
    trainer.require_loaded()
    group = RankGroup()
    with group.together():
        path = _resolve(Path(checkpoint))
        description = json.loads((path / _DESCRIPTION).read_text())
        tensors = TrainerTensors(trainer)
        _check_same_model(description, tensors, path)
    same_layout = description["layout"] == str(trainer.layout)
    with group.together(), megatron_runtime(), _Tried(f"cannot load {path}"):
        common = _load(trainer, tensors, path, same_layout)
    steps, saved, config = common["optimizer_steps"], common["learning_rate"], trainer.config
    set_step_count(trainer.optimizer, steps)
    trainer.scheduler.num_steps = steps
    trainer.set_learning_rate(saved["highest"] if saved["configured"] == config.learning_rate else config.learning_rate)
    if not same_layout:
        derive_random_state(common["seed"], description["step"], trainer.layout)
        how = "%s was saved by %s, this is %s: random states are derived from its seed and step"
        _log.info(how, path, description["layout"], trainer.layout)
    return LoadedCheckpoint(description["step"], common["state"], same_layout)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, `None` where there is none yet."""
    return max(_complete(Path(directory)), default=None)


def _content(trainer: MegatronTrainer, state: dict[str, Any]) -> dict[str, Any]:
    """What this rank writes, and what the first rank writes for all."""
    return {
        "tensors": TrainerTensors(trainer).shards(),
        "random_state": _random_state_shard(random_state()),
        "optimizer_steps": trainer.scheduler.num_steps,
        "learning_rate": {"highest": trainer.scheduler.max_lr, "configured": trainer.config.learning_rate},
        "grad_scaler": _grad_scaler_state(trainer),
        "seed": torch.initial_seed(),  # the first rank writes it, whose pipeline stage adds nothing to it
        "state": state,
    }


def _take_room(content: dict[str, Any], partial: Path, world_size: int) -> None:
    """Writes as much as Megatron's first rank will write alone: if it failed there, the others would wait for it in vain."""
    common = {name: value for name, value in content.items() if name not in ("tensors", "random_state")}
    shards = sum(map(len, content["tensors"].values())) + 1
    (partial / _ROOM).write_bytes(bytes((1 << 16) + _METADATA_BYTES * shards * world_size))
    torch.save(common, partial / "common.pt")


def _save(content: dict[str, Any], partial: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # Megatron would start a process to hold the queue of results, which outlives a rank that is killed. Nobody else needs it.
    filesystem_async._results_queue = queue.Queue()
    # One writer per rank: there are as many ranks as a machine has devices.
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    request = dist_checkpointing.save(content, str(partial), strategy, async_sharded_save=True)
    request.finalize_fns.insert(0, lambda: (partial / _ROOM).unlink(missing_ok=True))
    request.execute_sync()


def _load(trainer: MegatronTrainer, tensors: TrainerTensors, path: Path, same_layout: bool) -> dict[str, Any]:
    """One kind after the other, so that no more than the weights' size is needed beside the trainer."""
    from megatron.core import dist_checkpointing

    common: dict[str, Any] = {}
    for kind in KINDS:
        common = dist_checkpointing.load({"tensors": tensors.requests(kind)}, str(path))
        tensors.write(kind, common.pop("tensors", {}))
    if same_layout:
        wanted = {"random_state": _random_state_shard(None)}
        restore_random_state(dist_checkpointing.load(wanted, str(path))["random_state"])
    for part in trainer.optimizer.chained_optimizers:
        if getattr(part, "grad_scaler", None) and common["grad_scaler"]:
            part.grad_scaler.load_state_dict(common["grad_scaler"])
    return common


def _random_state_shard(data: Any) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("random_state", data, (dist.get_world_size(),), (dist.get_rank(),))


def _grad_scaler_state(trainer: MegatronTrainer) -> dict[str, Any]:
    scalers = [getattr(part, "grad_scaler", None) for part in trainer.optimizer.chained_optimizers]
    return scalers[0].state_dict() if scalers and scalers[0] else {}


class _Tried:
    """Turns what torch and Megatron raise into a CheckpointError that says what was tried."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, failure: BaseException | None, _: Any) -> None:
        # torch's own is no Exception: it would pass by whoever tells the other ranks.
        if isinstance(failure, Exception | CheckpointException) and not isinstance(failure, CheckpointError):
            raise CheckpointError(f"{self._what}: {type(failure).__name__}: {failure}") from failure


def _make_room(final: Path, partial: Path) -> None:
    if final.exists():
        raise CheckpointError(f"{final} exists already: resume from it, or choose another directory for this run")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as failure:
        raise CheckpointError(f"cannot write {partial}: {failure}") from failure


def _write_description(path: Path, trainer: MegatronTrainer, step: int) -> None:
    description = {
        "step": step,
        "layout": str(trainer.layout),
        "tensors": TrainerTensors(trainer).fingerprint,
        "adapters": trainer.has_adapters,
    }
    path.write_text(json.dumps(description, indent=1) + "\n")


def _publish(partial: Path, final: Path) -> None:
    """All bytes to the disk, then the name."""
    for path in [*partial.iterdir(), partial]:
        _to_disk(path)
    partial.rename(final)
    _to_disk(final.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_old(directory: Path, keep: int | None) -> None:
    complete = sorted(_complete(directory))
    for path in complete[:-keep] if keep else []:
        # Renamed first: a removal that is interrupted leaves no half of a checkpoint.
        doomed = path.with_name(f".{path.name}.partial")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _complete(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)] if directory.is_dir() else []


def _resolve(path: Path) -> Path:
    found = path if _NAME.fullmatch(path.name) else latest_checkpoint(path)
    if found is None or not (found / _DESCRIPTION).is_file():
        raise CheckpointError(
            f"{path} is no training checkpoint and holds none: give a folder step_ with eight digits, or one of such folders"
        )
    return found


def _check_same_model(description: dict[str, Any], tensors: TrainerTensors, path: Path) -> None:
    if description["tensors"] != tensors.fingerprint:
        what = "adapters" if description["adapters"] else "weights"
        raise CheckpointError(
            f"{path} holds the {what} of another model, or of other adapters, than the trainer's "
            f"({listed(tensors.hf_names, 3)}): build the model and add adapters as for the run that saved it"
        )
