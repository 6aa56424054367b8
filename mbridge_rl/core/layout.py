"""How a Megatron model is distributed over ranks, as data.

The arithmetic is Megatron-core's own (`parallel_state.RankGenerator`): a rank is a mixed-radix number whose digits are its
coordinates on the axes in `order`, fastest first. Attention and dense layers use the axes `tp cp dp pp`; expert layers use
`etp ep expert-dp pp` over the same ranks. Sequence parallelism has no place here: it moves activations, never weights.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, fields, replace

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.pipeline import Layout, counted_stages, dealt_layers

_AXES = ("tp", "cp", "ep", "dp", "pp")
_MOST_RANKS = 1 << 24


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One rank's coordinate on every axis."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    expert_dp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes `tp pp vpp ep etp cp dp`, and how layers are distributed over pipeline stages.

    Layers are distributed evenly unless an argument says otherwise; the arguments are Megatron's, and all of them are turned
    into `stage_layers`.

    Args:
        etp: expert tensor parallelism; `None` means `tp`, as in Megatron.
        dp: data parallelism of the dense layers; that of the expert layers follows from the other axes.
        order: Megatron's rank order, fastest axis first.
        stage_layers: decoder layers of each virtual stage in model order, `pp * vpp` numbers; virtual stage `s` is
            chunk `s // pp` of pipeline rank `s % pp`. `None` distributes layers by the arguments below.
        stage_mtp_layers: multi-token prediction layers of each virtual stage; `None` puts them on the last one.
        first_stage_layers, last_stage_layers: decoder layers of the first and the last pipeline rank; those between share the
            rest (Megatron's `num_layers_in_first_pipeline_stage`).
        embedding_as_layer, loss_as_layer: whether the embedding (loss) counts as a layer when layers are distributed
            (`account_for_embedding_in_pipeline_split`).
        vocab_multiple: the padded vocabulary is a multiple of `tp * vocab_multiple` (Megatron-LM's
            `make_vocab_size_divisible_by`).
        pipeline_layout: Megatron's `pipeline_model_parallel_layout`, a string such as `Et*3|(tt|)*29,m|L` or lists; becomes
            `stage_layers`, `stage_mtp_layers` and `vpp`.

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
    stage_mtp_layers: tuple[int, ...] | None = None
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    embedding_as_layer: bool = False
    loss_as_layer: bool = False
    vocab_multiple: int = 1
    pipeline_layout: InitVar[Layout | None] = None

    def __post_init__(self, pipeline_layout: Layout | None) -> None:
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp)
        if pipeline_layout is not None:
            self._set_stages(pipeline_layout)
        for name in ("stage_layers", "stage_mtp_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for axis in ("tp", "pp", "vpp", "ep", "etp", "cp", "dp", "vocab_multiple"):
            if getattr(self, axis) < 1:
                raise LayoutError(f"{axis} must be at least 1, found {getattr(self, axis)}")
        if max(self.world_size, self.num_stages) > _MOST_RANKS:
            raise LayoutError(
                f"at most {_MOST_RANKS:,} ranks can be planned, found tp*cp*dp*pp = {self.world_size:,} ranks with "
                f"pp*vpp = {self.num_stages:,} stages"
            )
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
        self._check_stages()

    def _set_stages(self, pipeline_layout: Layout) -> None:
        if self.stage_layers is not None or self.stage_mtp_layers is not None:
            raise LayoutError("pipeline_layout says all about stages: leave out stage_layers and stage_mtp_layers")
        stage_layers, stage_mtp_layers = counted_stages(pipeline_layout)
        vpp, left = divmod(len(stage_layers), max(1, self.pp))
        if left or self.vpp not in (1, vpp):
            raise LayoutError(
                f"pipeline layout {pipeline_layout!r} has {len(stage_layers)} stages, which are not pp*vpp = "
                f"{self.pp}*{self.vpp}"
            )
        for name, value in {"stage_layers": stage_layers, "stage_mtp_layers": stage_mtp_layers, "vpp": vpp}.items():
            object.__setattr__(self, name, value)

    def _check_stages(self) -> None:
        for name in ("stage_layers", "stage_mtp_layers"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.num_stages:
                raise LayoutError(f"{name} needs pp*vpp = {self.num_stages} numbers, found {len(numbers)}: {numbers}")
        ends = self.first_stage_layers is not None or self.last_stage_layers is not None
        as_layers = self.embedding_as_layer or self.loss_as_layer
        if (self.stage_layers is not None) + ends + as_layers > 1:
            raise LayoutError(
                "say in one way how layers are dealt: stage_layers (or pipeline_layout), first_stage_layers and "
                f"last_stage_layers, or embedding_as_layer and loss_as_layer; found {self}"
            )
        for name in ("first_stage_layers", "last_stage_layers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise LayoutError(f"{name} must be at least 1, found {getattr(self, name)}; stage_layers admits empty stages")
        if self.pp == 1 and None not in (self.first_stage_layers, self.last_stage_layers):
            raise LayoutError("first_stage_layers and last_stage_layers are of one and the same pipeline rank: pp is 1")
        filled = [stage for stage, count in enumerate(self.stage_mtp_layers or ()) if count]
        if len(filled) > 1 or (filled and filled[0] < self.num_stages - self.pp):
            raise LayoutError(
                "multi-token prediction layers must all be in one stage, the last of its pipeline rank; found "
                f"stage_mtp_layers={self.stage_mtp_layers}"
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
        """The coordinates of `rank` on every axis.

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

    def layers_of_stages(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of each virtual stage, in model order.

        Raises:
            LayoutError: `stage_layers` does not sum up to `num_layers`, or is missing where layers cannot be distributed
                evenly.
        """
        counts = self.stage_layers
        if counts is None:
            try:
                return dealt_layers(
                    num_layers,
                    self.pp,
                    self.vpp,
                    first=self.first_stage_layers,
                    last=self.last_stage_layers,
                    embedding_as_layer=self.embedding_as_layer,
                    loss_as_layer=self.loss_as_layer,
                )
            except LayoutError as error:
                raise LayoutError(
                    f"{num_layers} layers do not divide over pp*vpp = {self.pp}*{self.vpp} stages ({error}); "
                    f"state the split: stage_layers=({self.num_stages} numbers that sum up to {num_layers})"
                ) from error
        if sum(counts) != num_layers or min(counts) < 0:
            raise LayoutError(f"stage_layers {counts} must sum up to the model's {num_layers} layers, found {sum(counts)}")
        return counts

    def stage_of_layer(self, num_layers: int) -> list[int]:
        """The virtual stage of each decoder layer. Raises the errors of `layers_of_stages`."""
        return [stage for stage, count in enumerate(self.layers_of_stages(num_layers)) for _ in range(count)]

    def layers_of(self, num_layers: int, pp_rank: int, chunk: int) -> range:
        """Global indices of the decoder layers in model chunk `chunk` of pipeline rank `pp_rank`."""
        counts, stage = self.layers_of_stages(num_layers), chunk * self.pp + pp_rank
        return range(sum(counts[:stage]), sum(counts[: stage + 1]))

    @property
    def mtp_stage(self) -> int:
        """The virtual stage that holds the multi-token prediction layers, if the model has any."""
        counts = self.stage_mtp_layers or ()
        return next((stage for stage, count in enumerate(counts) if count), self.num_stages - 1)

    def dealing_as(self, other: ParallelLayout) -> ParallelLayout:
        """The same ranks, with the layers distributed over stages as in `other`."""
        names = ("stage_layers", "stage_mtp_layers", "first_stage_layers", "last_stage_layers")
        return replace(self, **{name: getattr(other, name) for name in (*names, "embedding_as_layer", "loss_as_layer")})

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
