"""What a trainer's step tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

from mbridge_rl.training.batch import TokenStatistics


@dataclass(frozen=True)
class Gradients:
    """What a forward and backward pass saw; the same on every rank. The gradients are in the model's `main_grad`.

    Attributes:
        loss: of the whole batch: the mean over its tokens or, of a `WeightedLoss`, the weighted sum.
        tokens: that the loss counted.
        statistics: of the policy, `[batch, seq]` each; zero where nothing had to be computed.
    """

    loss: float
    tokens: int
    statistics: TokenStatistics


@dataclass(frozen=True)
class StepReport(Gradients):
    """What one optimizer step saw; the same on every rank.

    Attributes:
        statistics: of the policy before the update.
        grad_norm: global, before clipping.
        learning_rate: of the step.
        updated: whether weights changed.
        skipped: why they did not; empty where they did.
    """

    grad_norm: float
    learning_rate: float
    updated: bool
    skipped: str = ""
