"""The process groups that a model was built with, where its caller does not use Megatron's global parallel state."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# The fields of Megatron's `ProcessGroupCollection`, by the axis of a layout.
_FIELDS = {"tp": "tp", "pp": "pp", "cp": "cp", "dp": "dp", "ep": "ep", "etp": "expt_tp"}


def groups_by_axis(pg_collection: Any) -> dict[str, dist.ProcessGroup]:
    """The groups of a `ProcessGroupCollection` that its owner has set. Reading another one raises before 0.19 and gives `None`
    since."""
    groups = {axis: getattr(pg_collection, field, None) for axis, field in _FIELDS.items()}
    return {axis: group for axis, group in groups.items() if group is not None}
