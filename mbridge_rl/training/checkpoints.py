"""Checkpoints of a run: `RUN/checkpoints/step-000010` has everything to go on with step 11, or does not exist.

The trainer's part (weights or adapters, optimizer, schedule, random states) is Megatron's distributed checkpoint, which
another layout can load. The rollouts' part is groups that were started and not yet trained on, token by token, and the order
of problems.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from mbridge_rl.sync.group import RankGroup
from mbridge_rl.training.rollout import on_first_rank
from mbridge_rl.training.source import RolloutSource
from mbridge_rl.training.trainer import MegatronTrainer

_NAME = re.compile(r"step-(\d+)")


def newest_step(run_dir: Path) -> int:
    """Of the newest whole checkpoint; 0 if there is none."""
    return max(_steps(run_dir), default=0)


def save(run_dir: Path, step: int, trainer: MegatronTrainer, source: RolloutSource, *, keep: int) -> None:
    """All ranks together, while the source is paused. The `keep` newest stay."""
    group, directory = RankGroup(), _directory(run_dir, step)
    partial = directory.with_suffix(".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def end() -> None:
        torch.save(source.state_dict(), partial / "rollouts.pt")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
        for old in sorted(_steps(run_dir))[:-keep]:
            shutil.rmtree(_directory(run_dir, old))

    group.first_rank_does(begin)
    trainer.save_checkpoint(partial / "trainer")
    group.first_rank_does(end)


def load(run_dir: Path, step: int, trainer: MegatronTrainer, source: RolloutSource) -> None:
    """All ranks together, before the source's first `resume`."""
    directory = _directory(run_dir, step)
    trainer.load_checkpoint(directory / "trainer")
    # Our own file, with episodes in it: only who may write to the run folder can put something else there.
    on_first_rank(RankGroup(), lambda: source.load_state_dict(torch.load(directory / "rollouts.pt", weights_only=False)))


def _steps(run_dir: Path) -> list[int]:
    found = (run_dir / "checkpoints").glob("step-*") if run_dir.exists() else ()
    return [int(match[1]) for path in found if (match := _NAME.fullmatch(path.name))]


def _directory(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"
