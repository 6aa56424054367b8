"""The state that Megatron's optimizers hold for each model parameter, in one form for all optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbridge_rl.core.plan import View
from mbridge_rl.core.segments import Segment

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """Adam's state of one model parameter on this rank.

    Attributes:
        master: the tensor that the optimizer updates: the parameter itself, its fp32 master or, with the distributed optimizer,
            a flat part of that.
        moments: `exp_avg` and `exp_avg_sq`, of master's shape.
        part: the range of the flattened parameter that this rank holds; `None` where it holds the full parameter.
    """

    master: Tensor
    moments: dict[str, Tensor]
    part: slice | None = None

    @property
    def begin(self) -> int:
        """The index in the flattened parameter at which this state begins."""
        return 0 if self.part is None else self.part.start

    def view(self, kind: str, piece: Segment) -> Tensor:
        """The view of `piece`, a segment of the parameter within this state, in the master or in a moment (`kind`)."""
        held = (self.master if kind == "master" else self.moments[kind]).detach()
        return View(piece.local_name, piece.offset - self.begin, piece.strides).of(held, piece.box.size)

    def write_master(self, parameter: Tensor) -> None:
        """Copies this rank's part of the full parameter into the master."""
        self.master.detach().copy_(parameter if self.part is None else parameter.flatten()[self.part])


def parameter_states(optimizer: Any) -> dict[Tensor, ParameterState]:
    """The state of every model parameter that this rank updates in full or in part. State that the first step would create is
    created."""
    states: dict[Tensor, ParameterState] = {}
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        part.init_state_fn(part.optimizer, part.config)
        for parameter, master, held in _masters(part):
            state = part.optimizer.state[master]
            if isinstance(part.optimizer, torch.optim.Optimizer) and not _counts_steps_per_group(part.optimizer):
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
            states[parameter] = ParameterState(master, {kind: state[kind] for kind in MOMENTS}, held)
    return states


def dealt_parameters(optimizer: Any) -> dict[Tensor, frozenset[int]]:
    """The parameters whose state the distributed optimizer divides among several ranks, with these ranks. Parameters of which
    this rank has no part are included."""
    return {
        parameter: frozenset(dist.get_process_group_ranks(part.data_parallel_group))
        for part in optimizer.chained_optimizers
        if _is_distributed(part)
        for buffer in part.buffers
        for parameter in buffer.param_index_map
    }


def set_step_count(optimizer: Any, steps: int) -> None:
    """Sets the number of steps that Adam has made, on which its bias correction depends."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.optimizer.param_groups:
            if "step" in group or _counts_steps_per_group(part.optimizer):
                group["step"] = steps
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), steps)


def _masters(part: Any) -> Iterator[tuple[Tensor, Tensor, slice | None]]:
    """`(model parameter, master, part of it)` of one of Megatron's optimizers."""
    if _is_distributed(part):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            held = part._get_model_param_range_map(parameter)["param"]
            yield parameter, part.optimizer.param_groups[group]["params"][order], slice(held.start, held.end)
    elif hasattr(part, "float16_groups"):
        for parameters, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from ((parameter, master, None) for parameter, master in zip(parameters, masters, strict=True))
        for parameters in part.fp32_from_fp32_groups:
            yield from ((parameter, parameter, None) for parameter in parameters)
    else:
        for group in part.optimizer.param_groups:
            yield from ((parameter, parameter, None) for parameter in group["params"])


def _is_distributed(part: Any) -> bool:
    return hasattr(part, "gbuf_ranges")


def _counts_steps_per_group(inner: Any) -> bool:
    """Whether an Adam counts its steps per group, as fused ones do. Torch's counts per parameter."""
    return not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
