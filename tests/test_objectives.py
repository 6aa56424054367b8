"""Every objective, value and gradient, against the papers' formulas written out here sequence by sequence in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mbridge_rl.training.batch import Batch
from mbridge_rl.training.grpo import grpo_loss, supervised_loss
from mbridge_rl.training.logprobs import TokenStatistics
from mbridge_rl.training.objectives.advantages import group_advantages
from mbridge_rl.training.objectives.aggregation import token_weights
from mbridge_rl.training.objectives.config import GRPOConfig, objective
from mbridge_rl.training.objectives.correction import ImportanceCorrection, importance_weights
from mbridge_rl.training.objectives.kl import kl_penalty
from mbridge_rl.training.objectives.metrics import mismatch_metrics
from mbridge_rl.training.objectives.prepare import Selection, prepare_batch, select_rows
from mbridge_rl.training.objectives.shaping import overlong_penalty

GROUP, MAX_LENGTH = 4, 9
LENGTHS = [3, 9, 1, 5, 7, 2, 8, 4, 6, 6, 1, 3]
REWARDS = [1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 2.0, 1.0]  # the second group's are all equal

Sequences = list[Tensor]
Estimate = Callable[[Tensor, Tensor], Tensor]
"""Of the KL from log-probabilities of the policy and the reference, per token."""


class Sample:
    """Log-probabilities of completions: as lists of sequences for the formulas, and as a batch for the library."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(scale: float) -> Sequences:
            return [scale * torch.randn(length, generator=generator, dtype=torch.float64) for length in LENGTHS]

        self.policy = [(-2 + value).requires_grad_() for value in draw(0.5)]
        self.entropy = [value.abs().requires_grad_() for value in draw(1.0)]
        self.old = [policy.detach() + noise for policy, noise in zip(self.policy, draw(0.4), strict=True)]
        self.rollout = [old + noise for old, noise in zip(self.old, draw(0.5), strict=True)]
        self.reference = [policy.detach() + noise for policy, noise in zip(self.policy, draw(0.6), strict=True)]
        self.rewards = torch.tensor(REWARDS, dtype=torch.float64)
        prompts = [[5] * (1 + row % 3) for row in range(len(LENGTHS))]
        batch = Batch.from_completions(prompts, [[7] * length for length in LENGTHS], pad_token_id=0)
        self.batch = batch.with_tensors(
            old_log_probs=self.spread(batch, self.old),
            rollout_log_probs=self.spread(batch, self.rollout),
            reference_log_probs=self.spread(batch, self.reference),
        )

    @staticmethod
    def spread(batch: Batch, sequences: Sequences) -> Tensor:
        values = torch.zeros(batch.tokens.shape, dtype=torch.float64)
        return values.masked_scatter(batch.mask, torch.cat(list(sequences)))

    def ours(self, config: GRPOConfig) -> Tensor:
        """The library's loss of the whole batch."""
        selection = select_rows(config, self.batch, self.rewards)
        kept = torch.ones(len(self.batch), dtype=torch.bool)
        if config.dynamic_sampling:
            kept[4:8] = False
        batch = prepare_batch(config, selection.batch, selection.rewards).batch
        policy = TokenStatistics(
            self.spread(self.batch, self.policy)[kept], self.spread(self.batch, self.entropy)[kept], batch.mask
        )
        loss = grpo_loss(config)
        return (loss.token_weights(batch.mask) * loss(policy, batch)).sum()


def group_relative(rewards: Tensor, *, std: bool) -> Tensor:
    groups = rewards.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6) if std else centred).view(-1)


def ppo(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    return (reference - policy).exp() - (reference - policy) - 1


def paper_grpo(s: Sample) -> Tensor:
    """arXiv:2402.03300, eq. 3."""
    advantages, total = group_relative(s.rewards, std=True), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        ratio = (policy - s.old[i]).exp()
        total = total + (ppo(ratio, advantages[i], 0.2, 0.2) - 0.04 * k3(policy, s.reference[i])).sum() / LENGTHS[i]
    return -total / len(LENGTHS)


def paper_dr_grpo(s: Sample) -> Tensor:
    """arXiv:2503.20783: neither the deviation nor the length divides."""
    advantages, total = group_relative(s.rewards, std=False), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        total = total + ppo((policy - s.old[i]).exp(), advantages[i], 0.2, 0.2).sum() / MAX_LENGTH
    return -total / len(LENGTHS)


def paper_dapo(s: Sample) -> Tensor:
    """arXiv:2503.14476, eqs. 8, 9 and 13: groups with a gradient alone, mean over tokens, soft overlong punishment."""
    punished = s.rewards.clone()
    for i, length in enumerate(LENGTHS):
        if length > MAX_LENGTH - 4:
            punished[i] += (MAX_LENGTH - 4 - length) / 4
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    advantages = dict(zip(rows, group_relative(punished[rows], std=True), strict=True))
    total = sum(ppo((s.policy[i] - s.old[i]).exp(), advantages[i], 0.2, 0.28).sum() for i in rows)
    return -total / sum(LENGTHS[i] for i in rows)


def paper_gspo(s: Sample) -> Tensor:
    """arXiv:2507.18071, eqs. 5 to 7, the ratio differentiated as a whole."""
    advantages, total = group_relative(s.rewards, std=True), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        ratio = (policy.sum() - s.old[i].sum()).div(LENGTHS[i]).exp()
        total = total + ppo(ratio, advantages[i], 0.1, 0.15)
    return -total / len(LENGTHS)


def paper_cispo(s: Sample) -> Tensor:
    """arXiv:2506.13585, eqs. 4 and 5, without the lower bound."""
    advantages, total = group_relative(s.rewards, std=True), torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        weight = (policy - s.old[i]).exp().detach().clamp(max=1.2)
        total = total + (weight * advantages[i] * policy).sum()
    return -total / sum(LENGTHS)


def paper_rloo(s: Sample) -> Tensor:
    """arXiv:2402.14740: REINFORCE of whole completions against the mean reward of the others."""
    total = torch.zeros((), dtype=torch.float64)
    for i, policy in enumerate(s.policy):
        group = range(i // GROUP * GROUP, i // GROUP * GROUP + GROUP)
        others = sum(s.rewards[j] for j in group if j != i) / (GROUP - 1)
        total = total + (s.rewards[i] - others) * policy.sum()
    return -total / len(LENGTHS)


def paper_reinforce_plus_plus(s: Sample) -> Tensor:
    """arXiv:2501.03262: the deviation is that of the whole batch."""
    centred = group_relative(s.rewards, std=False)
    advantages = (centred - centred.mean()) / (centred.std() + 1e-6)
    total = sum(ppo((p - s.old[i]).exp(), advantages[i], 0.2, 0.2).sum() for i, p in enumerate(s.policy))
    return -total / sum(LENGTHS)


PAPERS: dict[str, tuple[GRPOConfig, Callable[[Sample], Tensor]]] = {
    "grpo": (objective("grpo", group_size=GROUP), paper_grpo),
    "dr_grpo": (objective("dr_grpo", group_size=GROUP, aggregation_length=MAX_LENGTH), paper_dr_grpo),
    "dapo": (objective("dapo", group_size=GROUP, overlong_length=MAX_LENGTH, overlong_buffer=4), paper_dapo),
    "gspo": (objective("gspo", group_size=GROUP, clip_low=0.1, clip_high=0.15), paper_gspo),
    "cispo": (objective("cispo", group_size=GROUP, clip_high=0.2), paper_cispo),
    "rloo": (objective("rloo", group_size=GROUP), paper_rloo),
    "reinforce++": (objective("reinforce++", group_size=GROUP), paper_reinforce_plus_plus),
}


def assert_same(ours: Tensor, paper: Tensor, inputs: Sequences) -> None:
    """Value and gradient; 1e-6 because advantages and weights are handed on in fp32."""
    torch.testing.assert_close(ours, paper, rtol=1e-6, atol=1e-7)
    found = torch.autograd.grad(ours, inputs, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(paper, inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-6, atol=1e-7)
    assert torch.cat(found).abs().max() > 1e-3


@pytest.mark.parametrize("name", PAPERS)
def test_equals_the_paper(name: str) -> None:
    config, paper = PAPERS[name]
    sample = Sample()
    assert_same(sample.ours(config), paper(sample), sample.policy)


def _token_mean(s: Sample, of_sequence: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over all tokens of what `of_sequence(index, log_probs, ratio)` says of a sequence's."""
    parts = [of_sequence(i, policy, (policy - s.old[i]).exp()) for i, policy in enumerate(s.policy)]
    return torch.cat(parts).sum() / sum(LENGTHS)


def _with_penalty(estimate: Estimate) -> Callable[[Sample], Tensor]:
    def loss(s: Sample) -> Tensor:
        advantages = group_relative(s.rewards, std=True)
        return _token_mean(
            s, lambda i, policy, ratio: -ppo(ratio, advantages[i], 0.2, 0.28) + 0.3 * estimate(policy, s.reference[i])
        )

    return loss


def _dual_clip(s: Sample) -> Tensor:
    """arXiv:1912.09729, eq. 5."""
    advantages = group_relative(s.rewards, std=True)

    def of(i: int, policy: Tensor, ratio: Tensor) -> Tensor:
        gain = ppo(ratio, advantages[i], 0.2, 0.28)
        return -(gain if advantages[i] >= 0 else torch.max(gain, 1.5 * advantages[i]))

    return _token_mean(s, of)


def _entropy(s: Sample) -> Tensor:
    advantages = group_relative(s.rewards, std=True)
    return _token_mean(s, lambda i, policy, ratio: -ppo(ratio, advantages[i], 0.2, 0.28) - 0.1 * s.entropy[i])


def _straight_through(estimate: Estimate) -> Estimate:
    """The value of `estimate`, the gradient of k2 (arXiv:2506.09477)."""
    return lambda p, r: estimate(p, r).detach() + (p - r) ** 2 / 2 - ((p - r) ** 2 / 2).detach()


def _kl_in_reward(estimate: Estimate) -> Callable[[Sample], Tensor]:
    def loss(s: Sample) -> Tensor:
        penalties = [estimate(old, reference).sum() for old, reference in zip(s.old, s.reference, strict=True)]
        advantages = group_relative(s.rewards - 0.3 * torch.stack(penalties), std=True)
        return _token_mean(s, lambda i, policy, ratio: -ppo(ratio, advantages[i], 0.2, 0.28))

    return loss


ESTIMATES: dict[str, Estimate] = {
    "k1": lambda p, r: p - r,
    "k2": lambda p, r: (p - r) ** 2 / 2,
    "k3": k3,
    "abs": lambda p, r: (p - r).abs(),
}


def _kl(estimator: str, **changes: Any) -> dict[str, Any]:
    return {"kl_coefficient": 0.3, "kl_estimator": estimator, **changes}


PIECES: dict[str, tuple[dict[str, Any], Callable[[Sample], Tensor]]] = {
    **{name: (_kl(name), _with_penalty(estimate)) for name, estimate in ESTIMATES.items()},
    **{
        f"straight-through {name}": (_kl(name, kl_straight_through=True), _with_penalty(_straight_through(estimate)))
        for name, estimate in ESTIMATES.items()
    },
    **{f"{name} in reward": (_kl(name, kl_in="reward"), _kl_in_reward(estimate)) for name, estimate in ESTIMATES.items()},
    "dual clip": ({"dual_clip": 1.5}, _dual_clip),
    "entropy": ({"entropy_coefficient": 0.1}, _entropy),
}


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_equal_their_formulas(piece: str) -> None:
    changes, formula = PIECES[piece]
    sample = Sample()
    if piece == "dual clip":
        sample.old[1] = sample.old[1] - 1.0  # a bad completion that has become likely
        sample.batch = sample.batch.with_tensors(old_log_probs=sample.spread(sample.batch, sample.old))
        assert ((sample.policy[1] - sample.old[1]).exp() > 1.5).any()
    config = GRPOConfig(group_size=GROUP, **changes)
    assert_same(sample.ours(config), formula(sample), [*sample.policy, *sample.entropy])


def _weighted(weight: Callable[[Tensor], Tensor]) -> Callable[[Sample], Tensor]:
    """`weight` of a sequence's ratios p_train / p_rollout multiplies its surrogate."""

    def loss(s: Sample) -> Tensor:
        advantages = group_relative(s.rewards, std=True)
        return _token_mean(
            s, lambda i, _, ratio: -weight((s.old[i] - s.rollout[i]).exp()) * ppo(ratio, advantages[i], 0.2, 0.28)
        )

    return loss


def _between(values: Tensor, low: float, high: float) -> Tensor:
    return (values >= low) & (values <= high)


CORRECTIONS: dict[str, tuple[ImportanceCorrection, Callable[[Tensor], Tensor]]] = {
    "token truncation": (ImportanceCorrection(cap=1.3), lambda r: r.clamp(max=1.3)),
    "sequence truncation": (
        ImportanceCorrection(weight="sequence", cap=1.3),
        lambda r: r.prod().clamp(max=1.3).expand_as(r),
    ),
    "IcePop": (
        ImportanceCorrection(cap=2.0, mask="token", mask_low=0.7, mask_high=2.0),
        lambda r: torch.where(_between(r, 0.7, 2.0), r, 0.0),
    ),
    "sequence mask": (
        ImportanceCorrection(weight="none", mask="sequence", mask_low=0.5, mask_high=2.0),
        lambda r: _between(r.prod(), 0.5, 2.0).double().expand_as(r),
    ),
    "geometric mask": (
        ImportanceCorrection(weight="none", mask="geometric", mask_low=0.9, mask_high=1.2),
        lambda r: _between(r.prod() ** (1 / len(r)), 0.9, 1.2).double().expand_as(r),
    ),
    "veto": (
        ImportanceCorrection(weight="none", veto=0.5),
        lambda r: (r.min() >= 0.5).double().expand_as(r),
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_equal_their_formulas(name: str) -> None:
    correction, weight = CORRECTIONS[name]
    sample = Sample()
    config = GRPOConfig(group_size=GROUP, correction=correction)
    assert_same(sample.ours(config), _weighted(weight)(sample), sample.policy)
    _, metrics = importance_weights(
        correction, sample.batch.need("old_log_probs"), sample.batch.need("rollout_log_probs"), sample.batch.mask
    )
    ratios = [(old - rollout).exp() for old, rollout in zip(sample.old, sample.rollout, strict=True)]
    dropped = torch.cat([weight(r) == 0 for r in ratios])
    assert metrics["importance_masked"] == pytest.approx(dropped.double().mean().item())
    assert 0 <= metrics["importance_masked"] < 1
    assert dropped.any() or (correction.mask == "none" and not correction.veto)


def test_aggregations_equal_their_formulas() -> None:
    sample = Sample()
    values = [policy.detach() for policy in sample.policy]
    spread, mask = sample.spread(sample.batch, values), sample.batch.mask
    mask = torch.cat([mask, torch.zeros_like(mask[:1])])  # a row where nothing counts is no sequence
    spread = torch.cat([spread, torch.ones_like(spread[:1])])
    sums = torch.stack([value.sum() for value in values])
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    expected = {
        "token-mean": sums.sum() / lengths.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-mean": (sums / lengths).mean(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-sum-norm": sums.mean() / 20,
    }
    for aggregation, value in expected.items():
        length = 20 if aggregation.endswith("norm") else None
        weights = token_weights(mask, aggregation, length=length)  # type: ignore[arg-type]
        torch.testing.assert_close((weights * spread).sum(), value)
        assert not weights[~mask].any()


def test_mismatch_metrics_equal_their_definitions() -> None:
    sample = Sample()
    old, rollout = torch.cat(sample.old), torch.cat(sample.rollout)
    ratio = (old - rollout).exp()
    totals = torch.stack([(a - b).sum() for a, b in zip(sample.old, sample.rollout, strict=True)])
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    found = mismatch_metrics(sample.batch.need("old_log_probs"), sample.batch.need("rollout_log_probs"), sample.batch.mask)
    expected = {
        "mismatch_mean": (old - rollout).abs().mean(),
        "mismatch_max": (old - rollout).abs().max(),
        "token_mult_prob_error": (old - rollout).abs().exp().mean(),
        "kl_train_rollout": (ratio * ratio.log() - ratio + 1).mean(),
        "kl_rollout_train": (rollout - old).mean(),
        "mismatch_k3": (ratio - 1 - ratio.log()).mean(),
        "ppl_ratio": (-(totals / lengths).mean()).exp(),
        "chi2_token": (ratio**2).mean() - 1,
        "chi2_sequence": ((2 * totals).exp() - 1).mean(),
        "ess": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-9)
    same = mismatch_metrics(sample.batch.need("old_log_probs"), sample.batch.need("old_log_probs"), sample.batch.mask)
    ones = {"token_mult_prob_error", "ppl_ratio", "ess"}
    assert all(value == pytest.approx(1.0 if name in ones else 0.0, abs=1e-12) for name, value in same.items())


def test_extreme_numbers_are_bounded() -> None:
    far = torch.tensor([[-300.0, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, -300.0]])
    for estimator in ("k1", "k2", "k3", "abs"):
        assert kl_penalty(far, other, estimator).isfinite().all()  # type: ignore[arg-type]
    assert kl_penalty(far, other, "k3").max() == 10.0
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights, _ = importance_weights(ImportanceCorrection(weight="sequence"), far, other, mask)
    assert weights.tolist() == [[1.0, 1.0]]
    assert all(math.isfinite(value) for value in mismatch_metrics(far, other, mask).values())


def test_overlong_penalty_is_the_papers() -> None:
    lengths = torch.tensor([1, 12, 13, 14, 16, 17, 30])
    expected = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert overlong_penalty(lengths, max_length=16, buffer=4).tolist() == expected


def test_unknown_rewards_count_for_nothing_and_are_counted() -> None:
    sample = Sample()
    rewards = sample.rewards.clone()
    rewards[1], rewards[9] = math.nan, math.inf
    config = GRPOConfig(group_size=GROUP)
    selection = select_rows(config, sample.batch, rewards)
    assert selection.metrics["rewards_not_finite"] == 2
    assert selection.metrics["constant_groups"] == 1
    batch = prepare_batch(config, selection.batch, selection.rewards).batch
    assert not batch.mask[[1, 9]].any()
    assert not batch.need("advantages")[[1, 9]].any()
    known = torch.tensor([1.0, 0.0, 0.5])
    expected = (known - known.mean()) / (known.std() + 1e-6)
    torch.testing.assert_close(group_advantages(rewards, GROUP)[[0, 2, 3]], expected)
    leave_one_out = group_advantages(rewards, GROUP, baseline="leave_one_out", normalize_std="none")
    torch.testing.assert_close(leave_one_out[[0, 2, 3]], torch.tensor([0.75, -0.75, 0.0]))
    with pytest.raises(ValueError, match="none of the 12 rewards is finite"):
        select_rows(config, sample.batch, rewards * math.nan)


def test_groups_without_variance_are_dropped_and_counted() -> None:
    sample = Sample()
    config = objective("dapo", group_size=GROUP)
    selection = select_rows(config, sample.batch, sample.rewards)
    assert selection.metrics["dropped_groups"] == 1
    assert torch.equal(selection.batch.tokens, sample.batch.tokens[[0, 1, 2, 3, 8, 9, 10, 11]])
    constant = select_rows(config, sample.batch, torch.ones(12))
    assert constant.metrics["dropped_groups"] == 3
    assert len(constant.batch) == constant.batch.num_tokens == 0
    prepared = prepare_batch(config, constant.batch, constant.rewards)
    assert prepared.metrics == {"advantage_mean": 0.0, "advantage_max": 0.0}


def test_truncated_completions_can_be_masked() -> None:
    sample = Sample()
    truncated = torch.arange(12) % 3 == 0
    selection = select_rows(
        GRPOConfig(group_size=GROUP, mask_truncated=True), sample.batch, sample.rewards, truncated=truncated
    )
    assert selection.metrics["truncated_rows"] == 4
    assert torch.equal(selection.batch.mask.any(dim=1), ~truncated)
    with pytest.raises(ValueError, match="needs to know which completions were truncated"):
        select_rows(GRPOConfig(group_size=GROUP, mask_truncated=True), sample.batch, sample.rewards)


def test_truncated_completions_are_punished_replaced_or_ignored() -> None:
    rewards, truncated = torch.tensor([1.0, 0.5, 3.0, 0.25]), torch.tensor([True, False, False, True])
    batch = Batch.from_completions([[1]] * 4, [[2, 3]] * 4, pad_token_id=0)

    def shaped(**changes: Any) -> Selection:
        return select_rows(GRPOConfig(group_size=4, **changes), batch, rewards, truncated=truncated)

    assert shaped(truncation_penalty=0.5).rewards.tolist() == [0.5, 0.5, 3.0, -0.25]
    assert shaped(truncated_reward=0.0).rewards.tolist() == [0.0, 0.5, 3.0, 0.0]
    assert shaped(truncated_reward=0.0, truncation_penalty=1.0).rewards.tolist() == [-1.0, 0.5, 3.0, -1.0]
    ignored = shaped(ignore_truncated=True)
    assert ignored.metrics["rewards_not_finite"] == 0
    assert ignored.batch.mask.any(dim=1).tolist() == [False, True, True, False]
    prepared = prepare_batch(GRPOConfig(group_size=4, normalize_std="none"), ignored.batch, ignored.rewards)
    assert prepared.batch.need("advantages")[:, 0].tolist() == [0.0, -1.25, 1.25, 0.0]  # of 0.5 and 3 alone


def test_numbers_that_are_none_are_refused_by_name() -> None:
    sample = Sample()
    old = sample.batch.need("old_log_probs").clone()
    old[sample.batch.mask.nonzero()[5].unbind()] = math.nan
    with pytest.raises(ValueError, match="old_log_probs of 1 tokens are not finite, first in row 1"):
        prepare_batch(GRPOConfig(group_size=GROUP), sample.batch.with_tensors(old_log_probs=old), sample.rewards)
    old = torch.where(sample.batch.mask, 0.0, math.nan)  # outside of the mask nobody looks
    sample.batch.with_tensors(old_log_probs=old).check_finite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": "reinforce"}, "surrogate='reinforce' is none of 'clip', 'cispo', 'policy_gradient'"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"group_size": 1}, "nothing to compare"),
        ({"mini_batches": 0}, "mini_batches=0 and epochs=1 must be at least 1"),
        ({"epochs": 0}, "mini_batches=1 and epochs=0 must be at least 1"),
        ({"group_size": 1, "baseline": "none", "normalize_std": "batch", "dynamic_sampling": True}, "leaves out every group"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"dual_clip": 1.1}, r"dual_clip=1.1 must exceed 1 \+ clip_high"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip belongs to surrogate='clip'"),
        ({"ratio": "sequence", "surrogate": "cispo"}, "ratio='sequence' needs surrogate='clip'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "aggregation_length=None"),
        ({"aggregation_length": 5}, "aggregation='token-mean' with aggregation_length=5"),
        ({"kl_coefficient": -0.1}, "must not be negative"),
        ({"kl_in": "reward"}, "kl_in='reward' with kl_coefficient=0"),
        ({"kl_in": "reward", "kl_coefficient": 0.1, "kl_straight_through": True}, "kl_straight_through is about gradients"),
        ({"old_log_probs": "rollout", "correction": ImportanceCorrection()}, "would count twice"),
        ({"overlong_buffer": 4}, "overlong_buffer=4 needs overlong_length"),
        ({"mask_truncated": True, "ignore_truncated": True}, "ignore_truncated leaves mask_truncated nothing to do"),
        ({"truncated_reward": 0.0, "ignore_truncated": True}, "rewards that ignore_truncated ignores"),
        ({"truncation_penalty": -1.0}, "truncation_penalty=-1.0 must not be negative"),
        ({"overlong_buffer": 4, "overlong_length": 3}, "overlong_buffer=4 is longer than overlong_length=3"),
    ],
)
def test_contradictory_objectives_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)


def test_unknown_objectives_and_empty_corrections_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown objective 'ppo': choose grpo, dr_grpo"):
        objective("ppo")
    with pytest.raises(ValueError, match="aggregation_length=None"):
        objective("dr_grpo")
    with pytest.raises(ValueError, match="corrects nothing"):
        ImportanceCorrection(weight="none")
    with pytest.raises(ValueError, match="mask_low < mask_high"):
        ImportanceCorrection(mask="token", mask_low=2.0, mask_high=1.0)
    with pytest.raises(ValueError, match="12 rewards for 3 rows"):
        select_rows(GRPOConfig(group_size=GROUP), Sample().batch.rows(slice(0, 3)), Sample().rewards)


def test_a_plain_function_is_a_loss_too() -> None:
    sample = Sample()
    policy = TokenStatistics(sample.spread(sample.batch, sample.policy), *torch.zeros(2, *sample.batch.tokens.shape))
    assert torch.equal(supervised_loss(policy, sample.batch), -policy.log_probs)
