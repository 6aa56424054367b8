"""The results of a trainer's step."""

from __future__ import annotations

from dataclasses import dataclass

from mbridge_rl.training.batch import TokenStatistics


@dataclass(frozen=True)
class Gradients:
    """The results of a forward and backward pass; the same on every rank. The gradients are in the model's `main_grad`.

    Attributes:
        loss: the loss of the whole batch: the mean over its tokens or, for a `WeightedLoss`, the weighted sum.
        tokens: the number of tokens in the mask.
        statistics: the policy's statistics, `[batch, seq]` each; zero outside of the mask.
    """

    loss: float
    tokens: int
    statistics: TokenStatistics


@dataclass(frozen=True)
class StepReport(Gradients):
    """The results of one optimizer step; the same on every rank.

    Attributes:
        statistics: the policy's statistics before the update.
        grad_norm: the global gradient norm before clipping.
        learning_rate: the learning rate of the step.
        updated: whether weights changed.
        skipped: why weights did not change; empty where they did.
    """

    grad_norm: float
    learning_rate: float
    updated: bool
    skipped: str = ""
