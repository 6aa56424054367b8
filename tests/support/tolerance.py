"""How far two computations of one value may be apart: from the dtype, the number of roundings between input and value, and the
scale of what is added up. Never from what one machine printed: kernels of another processor sum in another order.

    assert_near(log_probs, expected, forward(layers=4, width=136))
    assert_near_in_norm(gradient, expected, backward(layers=4, width=136))

An operation rounds its result by at most half of `eps`. The roundings of sums taken in different orders are nearly independent,
so that those of n operations add up as a random walk does, to the root of n and not to n (Higham and Mary, "A new approach to
probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). A uniform error of +-eps/2 has a standard deviation of
eps / sqrt(12). So `eps * sqrt(n)`, which `rounding` is, is 3.5 standard deviations of one such walk in which every partial sum
is as large as the largest value, and 2.4 of the difference of two. Partial sums are smaller than that, which leaves room for
the largest of many elements, and for functions in between that steepen an error a little.

That holds for values that depend smoothly on their inputs. Where a test compares something else, such as a choice of experts or
what is left of a difference of large numbers, it has to take a case that is far from the border, or to say what its value is
the difference of (`scale`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

Values = Tensor | float | Sequence[float]

STAGES = 8
"""Roundings of a transformer layer that follow each other, each of which may be a long sum: two norms, projections to queries,
keys and values, scores, their weighted values, the projection back, and the two products of an MLP."""

HEAD = 2
"""The last norm and the output layer."""

LOG = "MBRIDGE_TOLERANCE_LOG"
"""Environment variable: a file to which each comparison adds the share of its tolerance that it used (`tools/kernels.py`)."""


def rounding(terms: float, depth: float = 1, dtype: torch.dtype = torch.float32) -> float:
    """Relative to the scale of what is summed.

    Args:
        terms: of the longest sum of a stage.
        depth: stages that follow each other.
        dtype: in which sums and their results are kept.
    """
    return torch.finfo(dtype).eps * math.sqrt(terms * depth)


def forward(layers: int, width: int, dtype: torch.dtype = torch.float32) -> float:
    """Of a transformer's logits and log-probabilities.

    Args:
        width: the longest sum: the size of the hidden state, of the MLP or of the sequence.
    """
    return rounding(width, STAGES * layers + HEAD, dtype)


def backward(layers: int, width: int, dtype: torch.dtype = torch.float32) -> float:
    """Of its gradients: through the stages, and back through each with a product for its input and one for its weight."""
    return rounding(width, 3 * (STAGES * layers + HEAD), dtype)


def ratio_gradients(log_probs: Tensor, layers: int, width: int) -> float:
    """Of gradients of an objective with ratios to another policy: each token's is multiplied by its ratio, whose relative error
    is the absolute one of the log-probability. Over the tokens of a norm, that is the root of their mean square."""
    return backward(layers, width) + forward(layers, width) * log_probs.detach().double().square().mean().sqrt().item()


def assert_near(computed: Values, expected: Values, relative: float, *, scale: float | None = None, what: str = "") -> None:
    """Checks that no element differs by more than `relative` times the scale.

    Args:
        scale: of what the values are sums of; without it the largest element of `expected`, not each one's own: a small element
            is a sum of terms as large as the others'.
        what: is compared, for the message.
    """
    one, other = _doubles(computed), _doubles(expected)
    assert one.shape == other.shape, f"{what}: {tuple(one.shape)} is not {tuple(other.shape)}"
    if one.numel() == 0:
        return
    size = other.abs().max().item() if scale is None else scale
    _assert_within((one - other).abs().max().item(), relative * size, f"{what or 'an element'}, of a scale of {size:.3g},")


def near(computed: Tensor, expected: Tensor, relative: float) -> bool:
    """Whether `assert_near` would pass. Ranks use this, since they report their results instead of asserting."""
    return computed.shape == expected.shape and bool((computed - expected).abs().max() <= relative * expected.abs().max())


def assert_near_in_norm(
    computed: Tensor, expected: Tensor, relative: float, *, scale: float | None = None, what: str = ""
) -> None:
    """Checks that the norm of the difference is at most `relative` times `scale`, which is the norm of `expected` by default.

    For gradients and weights, whose single elements may be nearly zero.
    """
    one, other = _doubles(computed), _doubles(expected)
    assert one.shape == other.shape, f"{what}: {tuple(one.shape)} is not {tuple(other.shape)}"
    size = other.norm().item() if scale is None else scale
    _assert_within((one - other).norm().item(), relative * size, f"{what or 'a tensor'}, of a norm of {size:.3g},")


def assert_gradients_near(computed: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float) -> None:
    """Compares every tensor in norm. A gradient that cancels, such as that of a key's bias without positions, is a sum of terms
    as large as others': its scale is at least a hundredth of the largest norm."""
    assert computed.keys() == expected.keys()
    largest = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert_near_in_norm(computed[name], gradient, relative, scale=max(gradient.norm().item(), 1e-2 * largest), what=name)


def assert_trained_near(
    computed: Tensor, expected: Tensor, start: Tensor, relative: float, *, updates: int, what: str = ""
) -> None:
    """Compares weights after optimizer steps.

    The error of an update is its gradient's, `relative` to the update, if the optimizer's epsilon is not below the rounding of
    gradients: Adam divides each by its own size, and one that is all rounding moves its weight as far as any other. Each update
    sees the errors of those before it. What is stored of the sum of weight and update is rounded relative to the weight.
    """
    moved, size = ((values.double()).norm().item() for values in (expected - start, expected))
    tolerance = updates * relative * moved + rounding(updates, dtype=expected.dtype) * size
    assert tolerance < 0.1 * moved or torch.equal(expected, start), f"{what} has hardly moved: nothing would be compared"
    assert_near_in_norm(computed, expected, tolerance, scale=1.0, what=what)


def _doubles(values: Values) -> Tensor:
    return values.detach().double() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)


def _assert_within(error: float, limit: float, what: str) -> None:
    if path := os.environ.get(LOG):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
        line = json.dumps({"test": test, "what": what, "share": error / limit if limit else float(error > 0)})
        with Path(path).open("a") as log:
            log.write(line + "\n")
    assert error <= limit, f"{what} differs by {error:.3g}, rounding explains {limit:.3g}"  # false of NaN, too
