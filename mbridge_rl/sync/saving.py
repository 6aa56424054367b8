"""All ranks write one checkpoint together: each its own bytes, and none of them alone in success or failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mbridge_rl.core.plan import Plan
from mbridge_rl.hf.writer import StagingDirectory
from mbridge_rl.sync.errors import RanksUnreachable
from mbridge_rl.sync.group import RankGroup


def save_together(
    staging: StagingDirectory, plan: Plan, live: Mapping[str, Tensor], group: RankGroup, write_companions: Callable[[], None]
) -> None:
    """Writes and publishes `staging`; what is there already stays until that moment.

    Args:
        plan: from the ranks of `group` to whole HF tensors.
        live: this rank's tensors, by the plan's source names.
        write_companions: puts what belongs beside the weights into `staging.path`; called on rank 0.

    Raises:
        CheckpointError: on all ranks; what was staged is removed.
    """
    one_machine, mapped = group.on_one_machine, torch.zeros(1, dtype=torch.int64)
    try:
        group.first_rank_does(lambda: mapped.fill_(staging.create(mapped=one_machine)))
        use_mapping = bool(group.sum(mapped).item())
        with group.together():
            for copy in plan.from_rank(group.rank):
                staging.write(copy.target, copy.shape, copy.source.of(live[copy.source.name], copy.shape), mapped=use_mapping)
            staging.finish()
        group.first_rank_does(write_companions)
        group.first_rank_does(staging.publish)
    except RanksUnreachable:
        if group.rank == 0:
            staging.discard()
        raise
    except Exception:
        group.first_rank_does(staging.discard)
        raise
