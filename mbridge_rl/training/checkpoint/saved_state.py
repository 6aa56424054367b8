"""Training checkpoints: weights, Adam's state, schedule, random states and the caller's own state, by Megatron's distributed
checkpointing. Every rank writes its own part, and any other layout can load it (`checkpoint.tensors`).

    checkpoints/step_00000012/                      a complete checkpoint: only complete ones get such a name
    checkpoints/.step_00000013.ATTEMPT.incomplete/  a checkpoint that is being written
    checkpoints/.saving.lock                        held by the one run that is saving

A checkpoint is written under a temporary name, read back and compared with what every rank wanted to write, and only then
renamed. An interrupted or damaged save never looks like a checkpoint, and older checkpoints stay until the new one is verified.
With adapters only the adapters are saved: the frozen base model is loaded from its own checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from mbridge_rl.core.errors import CheckpointError, listed
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.hf.proof import READ_BACK_ADVICE, same_bits
from mbridge_rl.hf.publish import Replacement
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.versions.checkpoints import forgetting_failed_writes, save_asynchronously, write_common_file
from mbridge_rl.training.checkpoint.random_state import derive_random_state, random_state, restore_random_state
from mbridge_rl.training.checkpoint.tensors import KINDS, TrainerTensors
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer
from mbridge_rl.training.trainer.optimizer_state import set_step_count

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_LEFTOVER_NAME = re.compile(r"\.step_\d{8}\.([0-9a-f]{16}\.incomplete|partial)")  # a killed save or removal leaves such folders
_LOCK = ".saving.lock"
_RESERVED_SPACE = "room"  # a file that reserves disk space for what the first rank writes at the end
_METADATA_BYTES = 512  # largest size of one shard's metadata
_DESCRIPTION = "trainer.json"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Attributes:
    step: the last training step before the save.
    state: the caller's own state that was saved with the trainer.
    same_layout: whether the layout is the saved one, so that the ranks' random states were restored, too. With another layout
        new random states follow from the run's seed and this step (`random_state.derive_random_state`).
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
        directory: the folder of the run's checkpoints.
        step: the number of the last training step.
        state: the caller's own state, the same on all ranks (a data loader's position, a sampler's weights): tensors, numbers,
            texts, and lists and dictionaries of them.
        keep: how many of the newest checkpoints stay; `None` keeps all.

    Returns:
        The checkpoint's own directory.

    Raises:
        CheckpointError: on all ranks: the step is saved already, another process is saving there, the disk is full or not
            writable, or what was written reads back as something else. Older checkpoints are untouched.
    """
    trainer.require_loaded()
    directory, group = Path(directory), RankGroup()
    final = directory / f"step_{step:08d}"
    replacement = Replacement(final, lock=directory.resolve() / _LOCK, only_new=True)
    attempt = torch.zeros(1, dtype=torch.int64)
    try:
        with group.fail_together():
            if group.rank == 0:
                attempt.fill_(_begin(replacement, final))
        replacement.join(int(group.sum(attempt).item()))
        partial = replacement.path
        with group.fail_together(), megatron_runtime(), _FailuresAsCheckpointError(f"cannot save {final}"):
            content = _content(trainer, dict(state or {}))
            if group.rank == 0:
                _reserve_space(content, partial, group.size)
        with group.fail_together(), megatron_runtime(), _FailuresAsCheckpointError(f"cannot save {final}"):
            _save(content, partial)
        with megatron_runtime():
            _require_saved(content, partial, group)
        with group.fail_together(), _FailuresAsCheckpointError(f"cannot save {final}"):
            if group.rank == 0:
                _write_description(partial / _DESCRIPTION, trainer, step)
                replacement.publish(durable=True)
                _remove_old(directory, keep)
    finally:
        if group.rank == 0:
            replacement.end()
    _log.info("saved step %d to %s", step, final)
    return final


def load_checkpoint(trainer: MegatronTrainer, checkpoint: str | Path) -> LoadedCheckpoint:
    """Puts a checkpoint into the trainer, which may have another layout, optimizer sharding or dtype than the one that saved
    it; all ranks call it together, and fail together.

    The checkpoint does not hold a reference policy that is a copy of weights: load the initial weights, call
    `snapshot_reference`, then load the checkpoint.

    Args:
        checkpoint: the checkpoint's own directory, or the directory of a run's checkpoints, of which the newest is loaded.

    Raises:
        CheckpointError: on all ranks: there is no checkpoint, or it belongs to another model or to other adapters (nothing was
            changed); or a file cannot be read (then weights and optimizer are incomplete).
    """
    trainer.require_loaded()
    group = RankGroup()
    with group.fail_together():
        path = _resolve(Path(checkpoint))
        description = json.loads((path / _DESCRIPTION).read_text())
        tensors = TrainerTensors(trainer)
        _check_same_model(description, tensors, path)
    same_layout = description["layout"] == str(trainer.layout)
    with group.fail_together(), megatron_runtime(), _FailuresAsCheckpointError(f"cannot load {path}"):
        common = _load(trainer, tensors, path, same_layout)
    steps, saved, config = common["optimizer_steps"], common["learning_rate"], trainer.config
    set_step_count(trainer.optimizer, steps)
    trainer.scheduler.num_steps = steps
    trainer.set_learning_rate(saved["highest"] if saved["configured"] == config.learning_rate else config.learning_rate)
    if not same_layout:
        derive_random_state(common["seed"], description["step"], trainer.layout)
        message = "%s was saved by %s, this is %s: random states are derived from its seed and step"
        _log.info(message, path, description["layout"], trainer.layout)
    return LoadedCheckpoint(description["step"], common["state"], same_layout)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, `None` where there is none yet."""
    return max(_complete(Path(directory)), default=None)


def _content(trainer: MegatronTrainer, state: dict[str, Any]) -> dict[str, Any]:
    """The content that this rank writes, and the common content that the first rank writes for all."""
    return {
        "tensors": TrainerTensors(trainer).shards(),
        "random_state": _random_state_shard(random_state()),
        "optimizer_steps": trainer.scheduler.num_steps,
        "learning_rate": {"highest": trainer.scheduler.max_lr, "configured": trainer.config.learning_rate},
        "grad_scaler": _grad_scaler_state(trainer),
        "seed": torch.initial_seed(),  # the first rank writes it, whose pipeline stage adds nothing to it
        "state": state,
    }


def _reserve_space(content: dict[str, Any], partial: Path, world_size: int) -> None:
    """Writes the common part, and as many bytes as Megatron's first rank will write alone later. If the disk were full only
    then, the other ranks would wait for the first one in vain."""
    common = {name: value for name, value in content.items() if name not in ("tensors", "random_state")}
    shards = sum(map(len, content["tensors"].values())) + 1
    (partial / _RESERVED_SPACE).write_bytes(bytes((1 << 16) + _METADATA_BYTES * shards * world_size))
    write_common_file(common, partial)


def _save(content: dict[str, Any], partial: Path) -> None:
    request = save_asynchronously(content, partial)
    request.finalize_fns.insert(0, lambda: (partial / _RESERVED_SPACE).unlink(missing_ok=True))
    with forgetting_failed_writes():
        request.execute_sync()


def _require_saved(content: dict[str, Any], partial: Path, group: RankGroup) -> None:
    """Reads back what this rank has written, one kind of tensor after the other. The first rank also reads back the common
    part.

    Raises:
        CheckpointError: on all ranks: the files do not hold the content bit for bit, or cannot be read.
    """
    from megatron.core import dist_checkpointing

    common: dict[str, Any] = {}
    for kind in KINDS:
        # Together for every kind: a rank that failed alone would be missing in the next collective load.
        with group.fail_together(), _FailuresAsCheckpointError(f"{partial} cannot be read back"):
            written = {name: shards for name, shards in content["tensors"].items() if name.startswith(f"{kind}.")}
            requests = {
                name: [replace(shard, data=torch.empty_like(shard.data)) for shard in shards]
                for name, shards in written.items()
            }
            common = dist_checkpointing.load({"tensors": requests}, str(partial))
            loaded = common.pop("tensors", {})
            _require_same({name: [shard.data for shard in shards] for name, shards in written.items()}, loaded, partial)
    with group.fail_together(), _FailuresAsCheckpointError(f"{partial} cannot be read back"):
        loaded = dist_checkpointing.load({"random_state": _random_state_shard(None)}, str(partial))
        _require_same({"random_state": content["random_state"].data}, loaded, partial)
        if group.rank == 0:
            _require_same({name: content[name] for name in common}, common, partial)


def _require_same(expected: dict[str, Any], loaded: dict[str, Any], partial: Path) -> None:
    for name, value in expected.items():
        if not _same(value, loaded[name]):
            raise CheckpointError(f"{partial}: {name} reads back as something else than was written: {READ_BACK_ADVICE}")


def _same(left: Any, right: Any) -> bool:
    """Whether two values are equal, tensors and arrays bit for bit.

    The values may be what a caller may save, and random states: tensors, arrays, numbers, texts, lists and dictionaries of
    them.
    """
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return same_bits(left, right)
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(value, right[name]) for name, value in left.items())
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right or (left != left and right != right))  # NaN equals NaN here


def _load(trainer: MegatronTrainer, tensors: TrainerTensors, path: Path, same_layout: bool) -> dict[str, Any]:
    """Loads one kind of tensor after the other, so that no more memory than the weights' size is needed beside the trainer."""
    from megatron.core import dist_checkpointing

    common: dict[str, Any] = {}
    for kind in KINDS:
        common = dist_checkpointing.load({"tensors": tensors.requests(kind)}, str(path))
        tensors.write(kind, common.pop("tensors", {}))
    if same_layout:
        requests = {"random_state": _random_state_shard(None)}
        restore_random_state(dist_checkpointing.load(requests, str(path))["random_state"])
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


class _FailuresAsCheckpointError:
    """Turns whatever torch and Megatron raise inside of the block into a CheckpointError that begins with `message`."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, failure: BaseException | None, _: Any) -> None:
        # torch's CheckpointException is no Exception: `fail_together` would not catch it and the other ranks would not learn of
        # it.
        if isinstance(failure, Exception | CheckpointException) and not isinstance(failure, CheckpointError):
            raise CheckpointError(f"{self._message}: {type(failure).__name__}: {failure}") from failure


def _begin(replacement: Replacement, final: Path) -> int:
    if final.exists():
        raise CheckpointError(f"{final} exists already: resume from it, or choose another directory for this run")
    try:
        attempt = replacement.begin()
        for path in final.parent.iterdir():  # leftovers of any step: their writers are dead, since this process holds the lock
            if _LEFTOVER_NAME.fullmatch(path.name) and path != replacement.path:
                shutil.rmtree(path, ignore_errors=True)
    except OSError as failure:
        raise CheckpointError(f"cannot write {final}: {failure}") from failure
    return attempt


def _write_description(path: Path, trainer: MegatronTrainer, step: int) -> None:
    description = {
        "step": step,
        "layout": str(trainer.layout),
        "tensors": TrainerTensors(trainer).fingerprint,
        "adapters": trainer.has_adapters,
    }
    path.write_text(json.dumps(description, indent=1) + "\n")


def _remove_old(directory: Path, keep: int | None) -> None:
    complete = sorted(_complete(directory))
    for path in complete[:-keep] if keep else []:
        # The folder is renamed first, so that an interrupted removal leaves nothing that looks like a checkpoint.
        doomed = path.with_name(f".{path.name}.{secrets.token_hex(8)}.incomplete")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _complete(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)] if directory.is_dir() else []


def _resolve(path: Path) -> Path:
    checkpoint = path if _NAME.fullmatch(path.name) else latest_checkpoint(path)
    if checkpoint is None or not (checkpoint / _DESCRIPTION).is_file():
        raise CheckpointError(
            f"{path} is no training checkpoint and holds none: give a folder step_ with eight digits, or one of such folders"
        )
    return checkpoint


def _check_same_model(description: dict[str, Any], tensors: TrainerTensors, path: Path) -> None:
    if description["tensors"] != tensors.fingerprint:
        content = "adapters" if description["adapters"] else "weights"
        raise CheckpointError(
            f"{path} holds the {content} of another model, or of other adapters, than the trainer's "
            f"({listed(tensors.hf_names, 3)}): build the model and add adapters as for the run that saved it"
        )
