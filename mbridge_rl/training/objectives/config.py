"""The choice of an objective's components, and the published combinations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

from mbridge_rl.core.typed_values import range_problems
from mbridge_rl.training.objectives.advantages import Baseline, Normalization
from mbridge_rl.training.objectives.aggregation import Aggregation
from mbridge_rl.training.objectives.correction import ImportanceCorrection
from mbridge_rl.training.objectives.kl import KLEstimator

OBJECTIVES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {"clip_high": 0.2, "aggregation": "seq-mean-token-mean", "kl_coefficient": 0.04},
        "dr_grpo": {"clip_high": 0.2, "normalize_std": "none", "aggregation": "seq-mean-token-sum-norm"},
        "dapo": {"clip_high": 0.28, "aggregation": "token-mean", "dynamic_sampling": True},
        "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "seq-mean-token-mean"},
        "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token-mean"},
        "rloo": {
            "surrogate": "policy_gradient",
            "baseline": "leave_one_out",
            "normalize_std": "none",
            "aggregation": "seq-mean-token-sum",
        },
        "reinforce++": {"baseline": "group_mean", "normalize_std": "batch", "clip_high": 0.2, "aggregation": "token-mean"},
    }
)
"""The fields of `GRPOConfig` that each published objective sets; `docs/training.md` has formulas and sources."""


@dataclass(frozen=True)
class GRPOConfig:
    """The components of a policy-gradient step; `objective` returns the published combinations.

    Attributes:
        group_size: completions per prompt; advantages compare them with each other.
        baseline, normalize_std: how advantages are computed (`objectives.advantages`).
        surrogate: `"clip"` (PPO's), `"cispo"`, or `"policy_gradient"`, `-A log p` without a ratio (REINFORCE, RLOO).
        ratio: `"token"`, a ratio for each token, or `"sequence"`, GSPO's ratio for each sequence.
        clip_low, clip_high: the ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        dual_clip: bounds the loss of tokens with a negative advantage to so many times `|advantage|`; `None` sets no such
            bound.
        aggregation, aggregation_length: how losses of tokens become the loss of the batch (`objectives.aggregation`).
        kl_coefficient: weight of the KL to the reference policy; with 0 there is no reference policy.
        kl_estimator, kl_straight_through: how that KL is estimated (`objectives.kl`).
        kl_in: where the KL is added: `"loss"`, or `"reward"`, to the rewards before they are compared.
        entropy_coefficient: weight of an entropy bonus, which keeps the policy trying other answers.
        old_log_probs: the log-probabilities in the denominator of the ratio: `"rollout"` takes the engine's, `"recompute"` the
            trainer's own before the step (the ratio is then exactly 1 on the first step, whatever the engine's arithmetic).
        mini_batches: optimizer steps in one pass over a batch, whose groups are divided evenly among them. With recomputed
            log-probabilities the ratio is 1 at the first of them, so that clipping acts from the second on.
        epochs: passes over a batch; old log-probabilities, advantages and importance weights are computed once, before the
            first.
        correction: importance correction for the difference between engine and trainer; needs recomputed log-probabilities.
            `None` corrects nothing.
        dynamic_sampling: leave out groups whose rewards are all equal (DAPO).
        overlong_length, overlong_buffer: longest completion, and the number of tokens before it over which DAPO's soft penalty
            grows; with a buffer of 0 there is no penalty.
        overlong_penalty: factor of that penalty.
        mask_truncated: completions that were cut off give no gradient (DAPO's overlong filtering); their rewards count.
        ignore_truncated: neither gradients nor rewards of completions that were cut off count: groups are compared without
            them.
        truncated_reward: the reward of completions that were cut off, in the place of the reward function's; `None` keeps the
            reward function's.
        truncation_penalty: subtracted from the reward of completions that were cut off.

    Raises:
        ValueError: values contradict each other; the message names both.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {"objective": OBJECTIVES}

    group_size: int = 8
    baseline: Baseline = "group_mean"
    normalize_std: Normalization = "group"
    surrogate: Literal["clip", "cispo", "policy_gradient"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    aggregation: Aggregation = "token-mean"
    aggregation_length: int | None = None
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_straight_through: bool = False
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coefficient: float = 0.0
    old_log_probs: Literal["recompute", "rollout"] = "recompute"
    mini_batches: int = 1
    epochs: int = 1
    correction: ImportanceCorrection | None = None
    dynamic_sampling: bool = False
    overlong_length: int | None = None
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    mask_truncated: bool = False
    ignore_truncated: bool = False
    truncated_reward: float | None = None
    truncation_penalty: float = 0.0

    @property
    def knows_truncation(self) -> bool:
        """Whether completions that were cut off are treated differently from the others."""
        return self.mask_truncated or self.ignore_truncated or self.truncated_reward is not None or self.truncation_penalty > 0

    def __post_init__(self) -> None:
        if problems := range_problems(self):
            raise ValueError("; ".join(problems))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, choices))}")
        for is_contradiction, description in _contradictions(self):
            if is_contradiction:
                raise ValueError(f"contradictory objective: {description}")


_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "baseline": get_args(Baseline),
    "normalize_std": get_args(Normalization),
    "surrogate": ("clip", "cispo", "policy_gradient"),
    "ratio": ("token", "sequence"),
    "aggregation": get_args(Aggregation),
    "kl_estimator": get_args(KLEstimator),
    "kl_in": ("loss", "reward"),
    "old_log_probs": ("recompute", "rollout"),
}


def _contradictions(c: GRPOConfig) -> list[tuple[bool, str]]:
    norm, buffer = c.aggregation == "seq-mean-token-sum-norm", c.overlong_buffer
    lowest = 1.0 if c.surrogate != "cispo" else float("inf")
    return [
        (c.mini_batches < 1 or c.epochs < 1, f"mini_batches={c.mini_batches} and epochs={c.epochs} must be at least 1"),
        (c.group_size < 1, f"group_size={c.group_size} must be at least 1"),
        (
            c.group_size == 1 and (c.baseline != "none" or c.normalize_std == "group"),
            f"group_size=1 has nothing to compare: baseline={c.baseline!r} and normalize_std={c.normalize_std!r} make every "
            "advantage zero; use baseline='none' with normalize_std='batch' or 'none'",
        ),
        (c.group_size == 1 and c.dynamic_sampling, "dynamic_sampling leaves out every group of group_size=1"),
        (not 0 <= c.clip_low <= lowest or c.clip_high < 0, f"clip_low={c.clip_low} or clip_high={c.clip_high} is out of range"),
        (c.dual_clip is not None and c.surrogate != "clip", f"dual_clip belongs to surrogate='clip', not {c.surrogate!r}"),
        (c.dual_clip is not None and c.dual_clip <= 1 + c.clip_high, f"dual_clip={c.dual_clip} must exceed 1 + clip_high"),
        (c.ratio == "sequence" and c.surrogate != "clip", f"ratio='sequence' needs surrogate='clip', not {c.surrogate!r}"),
        (
            norm != (c.aggregation_length is not None),
            f"aggregation={c.aggregation!r} with aggregation_length={c.aggregation_length}",
        ),
        (c.aggregation_length is not None and c.aggregation_length < 1, f"aggregation_length={c.aggregation_length} < 1"),
        (c.kl_coefficient < 0 or c.entropy_coefficient < 0, "kl_coefficient and entropy_coefficient must not be negative"),
        (c.kl_in == "reward" and not c.kl_coefficient, "kl_in='reward' with kl_coefficient=0"),
        (c.kl_straight_through and c.kl_in == "reward", "kl_straight_through is about gradients, kl_in='reward' has none"),
        (
            c.correction is not None and c.old_log_probs == "rollout",
            "correction with old_log_probs='rollout' would count twice",
        ),
        (buffer < 0 or (buffer > 0) != (c.overlong_length is not None), f"overlong_buffer={buffer} needs overlong_length"),
        (buffer > (c.overlong_length or 0), f"overlong_buffer={buffer} is longer than overlong_length={c.overlong_length}"),
        (c.mask_truncated and c.ignore_truncated, "ignore_truncated leaves mask_truncated nothing to do"),
        (
            c.ignore_truncated and (c.truncated_reward is not None or c.truncation_penalty > 0),
            "truncated_reward and truncation_penalty are of rewards that ignore_truncated ignores",
        ),
        (c.truncation_penalty < 0, f"truncation_penalty={c.truncation_penalty} must not be negative"),
        (c.overlong_penalty <= 0, f"overlong_penalty={c.overlong_penalty} must be positive; overlong_buffer=0 turns it off"),
    ]


def objective(name: str, **changes: Any) -> GRPOConfig:
    """The published objective `name` with some fields changed; `dr_grpo` needs `aggregation_length`.

    Raises:
        ValueError: an unknown name, or fields that contradict each other.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}: choose {', '.join(OBJECTIVES)}")
    return GRPOConfig(**{**OBJECTIVES[name], **changes})
