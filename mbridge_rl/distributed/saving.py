"""All ranks write one checkpoint together. Each writes its own bytes, and all of them succeed or fail together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mbridge_rl.core.errors import RanksUnreachable
from mbridge_rl.core.plan import Plan
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.hf.writer import StagingDirectory


def save_together(
    staging: StagingDirectory, plan: Plan, live: Mapping[str, Tensor], group: RankGroup, write_companions: Callable[[], None]
) -> None:
    """Writes, proves and publishes `staging`. An older checkpoint stays in its place until the new one is published.

    Args:
        staging: the new checkpoint.
        plan: the copies from the ranks of `group` to HF tensors.
        live: this rank's tensors, by the plan's source names.
        group: the ranks; all call this together.
        write_companions: writes the other files of the checkpoint into `staging.path`; called on rank 0.

    Raises:
        CheckpointError: on all ranks; what was staged is removed.
    """
    one_machine, attempt_and_mapped = group.on_one_machine, torch.zeros(2, dtype=torch.int64)

    def create() -> None:
        created = staging.create(mapped=one_machine)
        attempt_and_mapped[:] = torch.tensor([created.attempt, int(created.mapped)])

    try:
        group.first_rank_does(create)
        attempt, mapped = group.sum(attempt_and_mapped).tolist()  # zero on the other ranks
        staging.join(attempt)
        with group.fail_together():
            for copy in plan.from_rank(group.rank):
                staging.write(copy.target, copy.shape, copy.source.of(live[copy.source.name], copy.shape), mapped=bool(mapped))
            written = staging.finish()
        written = group.sum(written)
        with group.fail_together():
            staging.prove(written, rank=group.rank, size=group.size)
        group.first_rank_does(write_companions)
        group.first_rank_does(staging.publish)
    except RanksUnreachable:
        raise
    except Exception:
        group.first_rank_does(staging.discard)  # before any rank goes on
        raise
    finally:
        if group.rank == 0:
            staging.discard()
