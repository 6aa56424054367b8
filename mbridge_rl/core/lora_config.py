"""The configuration of LoRA adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import Literal, TypeVar, get_args

from mbridge_rl.core.patterns import PatternError, pattern_matches, require_pattern

T = TypeVar("T")

Start = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]

MAX_RANK = 1 << 16

ATTENTION_TARGETS = ("linear_qkv", "linear_proj")
DENSE_TARGETS = (*ATTENTION_TARGETS, "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class LoRAConfig:
    """Attributes:
    rank: the rank of `B A`.
    rank_pattern, alpha_pattern: other ranks and alphas for some linears, as in PEFT: the first regular expression wins that
        matches the name of the HF linear, in full or from a dot on (`{"down_proj": 4, "layers.0.*": 8}`). A pattern may also
        match the name of the Megatron linear (`linear_qkv`). The parts of one fused linear must have one rank and one alpha.
    alpha: `scale` is `alpha / rank`, or `alpha / sqrt(rank)` with `rslora` (Kalajdzievski, arXiv 2312.03732).
    targets: which linears get adapters: names of Megatron linears (`linear_qkv`, `linear_fc1`, ...) or of HF linears (`q_proj`,
        which adapts only that part of a fused linear), or patterns of their full names (`*.experts.*`).
    layers: the decoder layers in which a target is adapted, by the target as written in `targets` (`{"q_proj": (0, 1)}`). A
        target that is missing here is adapted in all layers.
    canonical: whether every HF linear has its own `A`, as in PEFT; otherwise the parts of a fused linear share one.
    dora: whether the magnitude of every row is trained beside its direction.
    dropout: probability that an element of `A`'s input is dropped in training.
    start: the initial factors. `kaiming` (uniform) and `gaussian`: random `A`, `B` zero; `orthogonal`: both random, `B A` zero
        (the rank must be even); `pissa`: the principal components of the weights; `olora`: the first columns of their QR
        decomposition.
    stacked_experts: whether experts' adapters are those of PEFT's `target_parameters`: gate and up share one `A`, and all
        experts of a layer are in one tensor, as Transformers 5 has them in memory. Otherwise there is one pair per expert and
        linear, under the checkpoint's names.
    seed: seed of random factors and of dropout; the initial adapters do not depend on the parallel layout.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = DENSE_TARGETS
    canonical: bool = False
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    start: Start = "kaiming"
    stacked_experts: bool = False
    seed: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    @property
    def keeps_start(self) -> bool:
        """Whether the initial factors are subtracted, and therefore stored."""
        return self.start in ("pissa", "olora")

    @property
    def peft_rank(self) -> int:
        """The rank of the same adapter in PEFT."""
        return 2 * self.rank if self.keeps_start else self.rank

    @property
    def largest_peft_rank(self) -> int:
        """The largest PEFT rank of all linears: the rank that an engine's slots must hold."""
        return max(self.peft_rank, *(replace(self, rank=rank).peft_rank for rank in self.rank_pattern.values()), 1)

    @property
    def peft_alpha(self) -> float:
        """The `alpha` that gives the same scale at `peft_rank`."""
        return self.scale * (sqrt(self.peft_rank) if self.rslora else self.peft_rank)

    def targets_in(self, layer: int) -> tuple[str, ...]:
        """The targets that are adapted in a decoder layer."""
        return tuple(target for target in self.targets if layer in self.layers.get(target, (layer,)))

    def of_linear(self, *names: str) -> LoRAConfig:
        """The config of one linear, without patterns.

        Args:
            names: the full names of the linear.
        """
        rank = _matched(self.rank_pattern, names, self.rank)
        return replace(
            self, rank=rank, alpha=_matched(self.alpha_pattern, names, self.alpha), rank_pattern={}, alpha_pattern={}
        )

    def require_valid(self) -> None:
        """Raises ValueError where fields are out of range or contradict each other."""
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                require_pattern(pattern)
            except PatternError as error:
                raise ValueError(f"LoRA's pattern {error}") from error
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"LoRA's {name} must be at least 1 and at most {MAX_RANK:,}, found {rank}")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not 0.0 < alpha < inf:
                raise ValueError(f"LoRA's {name} must be a finite number above 0, found {alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA's dropout is a probability below 1, found {self.dropout}")
        if self.start not in get_args(Start):
            raise ValueError(f"LoRA can start from {', '.join(get_args(Start))}, found {self.start}")
        if self.start == "orthogonal" and self.rank % 2:
            raise ValueError(f"orthogonal adapters have an even rank, found {self.rank}")


def _matched(patterns: Mapping[str, T], names: Sequence[str], default: T) -> T:
    matches = (value for pattern, value in patterns.items() if any(pattern_matches(pattern, name) for name in names))
    return next(matches, default)
