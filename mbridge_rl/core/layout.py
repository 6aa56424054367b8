"""How a Megatron model is spread over ranks, as data.

The arithmetic is Megatron-core's own (`parallel_state.RankGenerator`): ranks are digits of a mixed-radix number whose axes
stand in `order`, fastest first. Attention and dense layers count `tp cp dp pp`; expert layers count `etp ep expert-dp pp`
over the same ranks. Sequence parallelism does not appear: it moves activations, never weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mbridge_rl.core.errors import LayoutError

_AXES = ("tp", "cp", "ep", "dp", "pp")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where one rank stands on every axis."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    expert_dp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes `tp pp vpp ep etp cp dp`, and how layers are dealt to pipeline stages.

    Args:
        etp: expert tensor parallelism; `None` means `tp`, as in Megatron.
        dp: data parallelism of the dense layers; the expert layers' follows from the rest.
        order: Megatron's rank order, fastest axis first.
        stage_layers: decoder layers of each virtual stage in model order, `pp * vpp` numbers; virtual stage `s` is
            chunk `s // pp` of pipeline rank `s % pp`. `None` deals layers evenly and demands that they divide.
        vocab_multiple: the padded vocabulary is a multiple of `tp * vocab_multiple` (Megatron-LM's
            `make_vocab_size_divisible_by`).

    Raises:
        LayoutError: an axis is below 1, or the axes cannot share one world.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int = 1
    order: str = "tp-cp-ep-dp-pp"
    stage_layers: tuple[int, ...] | None = None
    vocab_multiple: int = 1

    def __post_init__(self) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        if self.stage_layers is not None:
            object.__setattr__(self, "stage_layers", tuple(self.stage_layers))
        for axis in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "vocab_multiple"):
            if getattr(self, axis) < 1:
                raise LayoutError(f"{axis} must be at least 1, found {getattr(self, axis)}")
        if sorted(self.order.split("-")) != sorted(_AXES):
            raise LayoutError(f"order must name each of {'-'.join(_AXES)} once, found {self.order!r}")
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError(f"vpp={self.vpp} needs pp of at least 2: virtual stages interleave over pipeline ranks")
        dense, expert = self.tp * self.cp * self.dp, self.ep * self.expert_tp
        if dense % expert:
            raise LayoutError(
                f"ep*etp = {self.ep}*{self.etp} must divide tp*cp*dp = {self.tp}*{self.cp}*{self.dp}: expert layers use "
                f"the same {dense} ranks of a pipeline stage; raise dp to a multiple of {expert // math.gcd(dense, expert)}"
            )
        if self.stage_layers is not None and len(self.stage_layers) != self.num_stages:
            raise LayoutError(
                f"stage_layers needs pp*vpp = {self.num_stages} numbers, found {len(self.stage_layers)}: {self.stage_layers}"
            )

    @property
    def expert_tp(self) -> int:
        """`etp` with its default resolved."""
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        return self.tp * self.cp * self.dp // (self.ep * self.expert_tp)

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def num_stages(self) -> int:
        return self.pp * self.vpp

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` stands on every axis.

        Raises:
            LayoutError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside of a world of {self.world_size} ranks ({self})")
        dense = self._digits(rank, {"tp": self.tp, "cp": self.cp, "ep": 1, "dp": self.dp, "pp": self.pp})
        expert = self._digits(rank, {"tp": self.expert_tp, "cp": 1, "ep": self.ep, "dp": self.expert_dp, "pp": self.pp})
        if dense["pp"] != expert["pp"]:
            raise LayoutError(
                f"order={self.order!r} puts rank {rank} on pipeline stage {dense['pp']} for dense layers and "
                f"{expert['pp']} for experts; let pp come last, or let tp*cp*dp of the axes before it agree"
            )
        return Coordinates(
            tp=dense["tp"],
            cp=dense["cp"],
            dp=dense["dp"],
            pp=dense["pp"],
            ep=expert["ep"],
            etp=expert["tp"],
            expert_dp=expert["dp"],
        )

    def _digits(self, rank: int, sizes: dict[str, int]) -> dict[str, int]:
        digits = {}
        for axis in self.order.split("-"):
            rank, digits[axis] = divmod(rank, sizes[axis])
        return digits

    def stage_of_layer(self, num_layers: int) -> list[int]:
        """The virtual stage of each decoder layer.

        Raises:
            LayoutError: `stage_layers` does not sum up to `num_layers`, or is missing where they don't divide.
        """
        counts = self.stage_layers
        if counts is None:
            if num_layers % self.num_stages:
                raise LayoutError(
                    f"{num_layers} layers do not divide over pp*vpp = {self.pp}*{self.vpp} stages; "
                    f"state the split: stage_layers=({self.num_stages} numbers that sum up to {num_layers})"
                )
            counts = (num_layers // self.num_stages,) * self.num_stages
        if sum(counts) != num_layers or min(counts) < 0:
            raise LayoutError(f"stage_layers {counts} must sum up to the model's {num_layers} layers, found {sum(counts)}")
        return [stage for stage, count in enumerate(counts) for _ in range(count)]

    def layers_of(self, num_layers: int, pp_rank: int, chunk: int) -> range:
        """Global indices of the decoder layers in model chunk `chunk` of pipeline rank `pp_rank`."""
        stages = self.stage_of_layer(num_layers)
        stage = chunk * self.pp + pp_rank
        first = sum(1 for other in stages if other < stage)
        return range(first, first + stages.count(stage))

    def __str__(self) -> str:
        shown = [
            f"{field.name}={value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default and not (field.name == "etp" and value == self.tp)
        ]
        return f"layout({', '.join(shown) or 'one rank'})"


def padded_vocab_size(vocab_size: int, tp: int, multiple: int = 1) -> int:
    """The smallest multiple of `tp * multiple` that holds `vocab_size` rows."""
    return -(-vocab_size // (tp * multiple)) * tp * multiple
