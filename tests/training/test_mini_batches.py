"""Several optimizer steps on a batch: from the second on the objectives bound what they should, on every layout alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_samples import GROUP, LENGTHS, REWARDS, Sample
from paper_objectives import PAPERS
from ranks import run_ranks
from tiny import DENSE as SIZES
from tiny import saved_model, tiny_model
from tolerance import assert_near, assert_near_in_norm, assert_trained_near, forward, ratio_gradients, rounding
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.megatron.lora.attach import LoRAConfig, add_lora
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.checkpoint.saved_state import load_checkpoint, save_checkpoint
from mbridge_rl.training.loop import GRPO
from mbridge_rl.training.metrics import Metrics
from mbridge_rl.training.objectives.advantages import group_advantages
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.objectives.correction import ImportanceCorrection
from mbridge_rl.training.objectives.loss import TokenLoss, grpo_loss, policy_metrics
from mbridge_rl.training.objectives.mini_batches import mini_batch_rows
from mbridge_rl.training.objectives.prepare import prepare_batch, select_rows
from mbridge_rl.training.rollout.collect import RolloutBatch
from mbridge_rl.training.trainer.gradients import hf_gradients
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig
from mbridge_rl.training.trainer.step_report import StepReport

ROWS = len(LENGTHS)
Objective = tuple[GRPOConfig, Callable[[Sample], Tensor]]
DUAL_CLIP: Objective = (GRPOConfig(group_size=GROUP, clip_high=0.05, dual_clip=1.1), lambda s: _dual_clip(s))
OBJECTIVES: dict[str, Objective] = {**PAPERS, "dual clip": DUAL_CLIP}


def test_every_epoch_deals_all_groups_evenly_and_by_seed_and_step_alone() -> None:
    def dealt(**changes: int) -> list[list[int]]:
        options = {"rows": 21, "group_size": 3, "mini_batches": 2, "epochs": 3, "seed": 5, "step": 9, **changes}
        return [rows.tolist() for rows in mini_batch_rows(**options)]

    mini_batches = dealt()
    assert [len(rows) for rows in mini_batches] == [12, 9] * 3
    for epoch in (mini_batches[:2], mini_batches[2:4], mini_batches[4:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(21))
    assert all(rows == sorted(rows) and rows[::3] == [row // 3 * 3 for row in rows[::3]] for rows in mini_batches)
    assert mini_batches[0] != mini_batches[2] != mini_batches[4]
    torch.rand(3)
    assert dealt() == mini_batches
    assert dealt(seed=6) != mini_batches
    assert dealt(step=8) != mini_batches
    assert dealt(mini_batches=1, epochs=2) == [list(range(21))] * 2  # in the batch's own order
    assert sorted(map(len, dealt(mini_batches=9, epochs=1))) == [3] * 7  # dynamic sampling may leave fewer groups than 9


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mini_batches")


DENSE, MOE = "qwen3-tied", "qwen3-moe"
LAYERS, WIDTH = SIZES["num_hidden_layers"], SIZES["intermediate_size"]


def _rollouts(step: int = 0) -> RolloutBatch:
    """Lengths and rewards are `objective_samples`'; of the second group all rewards are equal. A good and a bad completion
    begin in the same way, so that tokens become likelier which are bad, too."""
    generator = torch.Generator().manual_seed(step)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 515, (count,), generator=generator).tolist()

    prompts, completions = [tokens(1 + row % 3) for row in range(ROWS)], [tokens(length) for length in LENGTHS]
    prompts[9], completions[9][:3] = prompts[0], completions[0]
    log_probs = [(-6 + torch.randn(length, generator=generator)).tolist() for length in LENGTHS]
    batch = Batch.from_completions(prompts, completions, pad_token_id=0, log_probs=log_probs)
    versions = torch.where(batch.mask, 1, -1)
    return RolloutBatch(batch, torch.tensor(REWARDS), versions, torch.zeros(ROWS, dtype=torch.bool))


def _grpo(
    checkpoint: Path,
    objective: GRPOConfig,
    layout: Layout,
    build: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    lora: LoRAConfig | None = None,
) -> GRPO:
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout, **(build or {}))
    bridge.load_weights(model)
    if lora is not None:
        add_lora(model, lora)
    settings = {"learning_rate": 1e-4, "epsilon": 1e-3, "micro_batch_size": 5, **(config or {})}
    return GRPO(MegatronTrainer(model, TrainerConfig(**settings)), objective, seed=7)


def _weights(grpo: GRPO, checkpoint: Path) -> dict[str, Tensor]:
    exported = AutoBridge.from_pretrained(checkpoint).export_weights(grpo.trainer.model)
    return {name: weight.clone() for name, weight in exported}


@dataclass
class Seen:
    """An optimizer step: the weights before it, the loss and its gradient, before clipping."""

    weights: dict[str, Tensor]
    loss: float
    gradients: dict[str, Tensor]


def _watch(grpo: GRPO, checkpoint: Path) -> list[Seen]:
    seen: list[Seen] = []
    bridge, step = AutoBridge.from_pretrained(checkpoint), grpo.trainer.step

    def watched(batch: Batch, loss: TokenLoss) -> StepReport:
        loss_value = grpo.trainer.compute_gradients(batch, loss).loss
        gradients = {name: gradient.clone() for name, gradient in hf_gradients(grpo.trainer, bridge).items()}
        seen.append(Seen(_weights(grpo, checkpoint), loss_value, gradients))
        return step(batch, loss)

    grpo.trainer.step = watched  # type: ignore[method-assign]
    return seen


def _two_epochs(rank: int, checkpoint: Path) -> dict[str, tuple[list[Seen], Metrics]]:
    results, layout = {}, initialize_parallel(Layout())
    for name, (config, _) in OBJECTIVES.items():
        grpo = _grpo(checkpoint, replace(config, epochs=2), layout)
        seen = _watch(grpo, checkpoint)
        results[name] = seen, grpo.update(_rollouts(), 1)
    return results


@pytest.fixture(scope="module")
def two_epochs(scratch: Path) -> dict[str, tuple[list[Seen], Metrics]]:
    return run_ranks(_two_epochs, 1, saved_model(DENSE, scratch))[0]


def _dual_clip(s: Sample) -> Tensor:
    """arXiv:1912.09729, eq. 5."""
    groups = s.rewards.view(-1, GROUP)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1)
    total = torch.zeros(())
    for policy, old, advantage in zip(s.policy, s.old, advantages, strict=True):
        ratio = (policy - old).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.05) * advantage)
        total = total - (gain if advantage >= 0 else torch.max(gain, 1.1 * advantage)).sum()
    return total / sum(LENGTHS)


def _log_probs(network: torch.nn.Module) -> list[Tensor]:
    batch = _rollouts().batch
    every = network(batch.tokens).logits.log_softmax(-1).gather(-1, batch.need("targets")[..., None])[..., 0]
    return [row[own] for row, own in zip(every, batch.mask, strict=True)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_second_update_is_the_papers_and_clips(name: str, two_epochs: dict[str, tuple[list[Seen], Metrics]]) -> None:
    """Transformers with the weights after the first update, its ratio to those before."""
    (first, second), metrics = two_epochs[name]
    sample, network = object.__new__(Sample), tiny_model(DENSE)
    sample.rewards = torch.tensor(REWARDS)
    network.load_state_dict(first.weights, strict=False)  # the tied head
    sample.old = sample.reference = [values.detach() for values in _log_probs(network)]
    network.load_state_dict(second.weights, strict=False)
    sample.policy = _log_probs(network)
    loss = OBJECTIVES[name][1](sample)
    loss.backward()
    log_probs = torch.cat(sample.policy)
    assert_near(second.loss, loss.item(), forward(LAYERS, WIDTH), scale=log_probs.abs().max().item())
    for hf_name, parameter in network.named_parameters():
        assert_near_in_norm(second.gradients[hf_name], parameter.grad, ratio_gradients(log_probs, LAYERS, WIDTH), what=hf_name)
    assert metrics["updates"] == 2
    assert metrics["ratio_max_deviation"] > 0.1
    if name != "rloo":
        assert metrics["clip_fraction_high"] + metrics["clip_fraction_low"] > 0.01
    if name == "dual clip":
        assert metrics["dual_clip_fraction"] > 0.01


def test_the_means_are_over_updates(two_epochs: dict[str, tuple[list[Seen], Metrics]]) -> None:
    (first, second), metrics = two_epochs["grpo"]
    assert_near(metrics["loss"], (first.loss + second.loss) / 2, rounding(2, dtype=torch.float64))


def _by_hand(rank: int, checkpoint: Path, objective: GRPOConfig) -> tuple[bool, Metrics, dict[str, float]]:
    """Two batches with one optimizer step each, and the same without the loop."""
    layout = initialize_parallel(Layout(tp=2))
    grpo, other = (_grpo(checkpoint, objective, layout, {}, {"micro_batch_size": 2}) for _ in range(2))
    trainer = other.trainer
    for step in (1, 2):
        metrics = grpo.update(_rollouts(step), step)
        rollouts = _rollouts(step)
        selection = select_rows(objective, rollouts.batch, rollouts.rewards)
        batch = selection.batch.with_tensors(
            old_log_probs=trainer.compute_log_probs(selection.batch).log_probs,
            reference_log_probs=trainer.reference_log_probs(selection.batch),
        )
        batch = prepare_batch(objective, batch, selection.rewards).batch
        report = trainer.step(batch, grpo_loss(objective))
    expected = {"loss": report.loss, "grad_norm": report.grad_norm, "tokens": report.tokens, "updates": 1}
    expected |= policy_metrics(report.statistics.log_probs, batch, objective)
    weights, again = _weights(grpo, checkpoint), _weights(other, checkpoint)
    return all(torch.equal(weights[name], again[name]) for name in weights), metrics, expected


def test_one_mini_batch_and_one_epoch_are_one_step_on_the_batch_bit_for_bit(scratch: Path) -> None:
    objective = GRPOConfig(group_size=GROUP, kl_coefficient=0.1, correction=ImportanceCorrection())
    for same, metrics, expected in run_ranks(_by_hand, 2, saved_model(DENSE, scratch), objective):
        assert same
        assert {name: metrics[name] for name in expected} == expected
        assert metrics["ratio_max_deviation"] == 0.0


FOUR_UPDATES = GRPOConfig(
    group_size=GROUP,
    aggregation="seq-mean-token-mean",
    kl_coefficient=0.1,
    entropy_coefficient=0.01,
    correction=ImportanceCorrection(),
    mini_batches=2,
    epochs=2,
)
PACK = {"packing": True, "micro_batch_tokens": 24}
SP = {"sequence_parallel": True}
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
LAYOUTS: list[tuple[str, Layout, dict[str, Any], dict[str, Any], LoRAConfig | None]] = [
    (DENSE, Layout(), {}, {"micro_batch_size": 8}, None),
    (DENSE, Layout(tp=2), SP, PACK, None),
    (DENSE, Layout(dp=2), {}, {"micro_batch_tokens": 30, **SHARDED}, None),
    (DENSE, Layout(dp=2), {}, {**PACK, **SHARDED}, None),
    (DENSE, Layout(pp=2, vpp=2), {}, {"micro_batch_size": 2}, None),
    (DENSE, Layout(cp=2), {}, PACK, None),
    (MOE, Layout(dp=2, ep=2), {}, {"micro_batch_size": 2, **SHARDED}, None),
    (DENSE, Layout(tp=2), SP, PACK, LoRAConfig(rank=4)),
]
# Steps after which log-ratios are of order 1 and some tokens are clipped. With larger ones ratios are in the thousands, and the
# rounding of a log-ratio is multiplied by its ratio. With an epsilon as large as gradients an update is proportional to them.
SMOOTH = {
    (DENSE, False): {"learning_rate": 3e-3, "epsilon": 0.1},
    (DENSE, True): {"learning_rate": 3e-3, "epsilon": 0.1},
    (MOE, False): {"learning_rate": 1e-3, "epsilon": 1e-2},
}


@dataclass
class Run:
    """Of two batches. By update: log-ratios to the old policy and log-probabilities, of the tokens that count."""

    metrics: list[Metrics]
    weights: dict[str, Tensor]
    log_ratios: list[Tensor]
    log_probs: list[Tensor]


def _two_batches(
    rank: int, checkpoint: Path, layout: Layout, build: dict[str, Any], config: dict[str, Any], lora: LoRAConfig | None
) -> Run:
    grpo = _grpo(checkpoint, FOUR_UPDATES, initialize_parallel(layout), build, config, lora)
    run, step = Run([], {}, [], []), grpo.trainer.step

    def watched(batch: Batch, loss: TokenLoss) -> StepReport:
        report = step(batch, loss)
        run.log_probs.append(report.statistics.log_probs[batch.mask])
        run.log_ratios.append(run.log_probs[-1] - batch.need("old_log_probs")[batch.mask])
        return report

    grpo.trainer.step = watched  # type: ignore[method-assign]
    run.metrics = [grpo.update(_rollouts(step), step) for step in (1, 2)]
    assert grpo.trainer.scheduler.num_steps == len(run.log_probs) == 8
    run.weights = _weights(grpo, checkpoint)
    return run


@cache
def _alone(variant: str, lora: LoRAConfig | None, scratch: Path) -> Run:
    run = run_ranks(_two_batches, 1, saved_model(variant, scratch), Layout(), {}, SMOOTH[variant, lora is not None], lora)[0]
    assert all(metrics["updates"] == 4 for metrics in run.metrics)
    assert any(metrics["clip_fraction_low"] > 0 for metrics in run.metrics)
    assert any(metrics["clip_fraction_high"] > 0 for metrics in run.metrics)
    # A token on a bound of the clipped ratio is clipped here and not there, and moves all weights: that would compare nothing.
    ratios = torch.cat(run.log_ratios).exp()
    bounds = torch.tensor([1 - FOUR_UPDATES.clip_low, 1 + FOUR_UPDATES.clip_high])
    assert (ratios[:, None] - bounds).abs().min() > 3 * _log_prob_error(run), (
        "a ratio lies on a bound, up to rounding: take other data"
    )
    return run


def _log_prob_error(run: Run) -> float:
    return forward(LAYERS, WIDTH) * torch.cat(run.log_probs).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout", "build", "config", "lora"), LAYOUTS, ids=str)
def test_four_updates_a_batch_are_the_same_on_every_layout(
    variant: str, layout: Layout, build: dict[str, Any], config: dict[str, Any], lora: LoRAConfig | None, scratch: Path
) -> None:
    """Mini-batches hold two groups or one, and there are eight optimizer steps in all."""
    alone, checkpoint = _alone(variant, lora, scratch), saved_model(variant, scratch)
    start, log_probs = _weights_of(checkpoint), torch.cat(alone.log_probs)
    gradients, worst = ratio_gradients(log_probs, LAYERS, WIDTH), _log_prob_error(alone)
    typical = forward(LAYERS, WIDTH) * log_probs.square().mean().sqrt().item()
    config = SMOOTH[variant, lora is not None] | config
    ranks = run_ranks(_two_batches, layout.world_size, checkpoint, layout, build, config, lora)
    for run in ranks:
        for actual, expected in zip(run.log_ratios, alone.log_ratios, strict=True):
            assert_near(actual, expected, worst, scale=1.0, what="log-ratios")
        for actual, expected in zip(run.metrics, alone.metrics, strict=True):
            assert _others(actual) == _others(expected)
            for name, value in _numbers(expected).items():
                error = worst if "max" in name else typical  # the error of one token, or of a mean over tokens
                tolerance = gradients * value if name == "grad_norm" else error * _steepness(name) * (1 + abs(value))
                assert_near(actual[name], value, tolerance, scale=1.0, what=name)
    for name, weight in alone.weights.items():
        assert_trained_near(ranks[0].weights[name], weight, start[name], gradients, updates=len(alone.log_probs), what=name)


def _steepness(metric: str) -> float:
    """How much a metric changes with the log-probabilities, relative to its size and 1: the mean of squared ratios of whole
    sequences by twice their length, all others by as much or less."""
    return 2.0 * max(LENGTHS) if metric == "chi2_sequence" else 1.0


def _numbers(metrics: Metrics) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def _others(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if not isinstance(value, float)}


def _weights_of(checkpoint: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def _one_group_teaches_nothing(rank: int, checkpoint: Path) -> tuple[Metrics, int, set[float], Metrics]:
    """Weights stay: what differs is who comes together."""
    objective = GRPOConfig(group_size=GROUP, mini_batches=3)
    grpo = _grpo(checkpoint, objective, initialize_parallel(Layout()), {}, {"learning_rate": 0.0})
    metrics, steps = grpo.update(_rollouts(), 1), grpo.trainer.scheduler.num_steps
    two = GRPO(grpo.trainer, replace(objective, mini_batches=2))
    losses = {round(two.update(_rollouts(), step)["loss"], 5) for step in (1, 1, 2, 3, 4, 5)}
    nothing = GRPO(grpo.trainer, GRPOConfig(group_size=GROUP, baseline="none", normalize_std="none"))
    skipped = nothing.update(replace(_rollouts(), rewards=torch.zeros(ROWS)), 1)
    return metrics, steps, losses, skipped


def test_a_mini_batch_is_normalized_by_its_own_tokens_and_without_a_gradient_makes_no_step(scratch: Path) -> None:
    metrics, steps, losses, skipped = run_ranks(_one_group_teaches_nothing, 1, saved_model(DENSE, scratch))[0]
    advantages = group_advantages(torch.tensor(REWARDS), GROUP).view(3, GROUP)
    lengths = torch.tensor(LENGTHS).view(3, GROUP)
    means = -(advantages * lengths).sum(dim=1) / lengths.sum(dim=1)  # ratios stay 1 without a learning rate
    assert_near(metrics["loss"], (means[0] + means[2]).item() / 2, rounding(sum(LENGTHS)), scale=advantages.abs().max().item())
    assert metrics["tokens"] == sum(LENGTHS)
    assert metrics["updates"] == steps == 2
    assert metrics["skipped"] is None
    assert 1 < len(losses) <= 3  # of three groups one is alone: another one at another step
    assert (skipped["updates"], skipped["skipped"]) == (0, "every advantage is zero")


def _steps(rank: int, checkpoint: Path, directory: Path, resumed: bool) -> tuple[list[Metrics], dict[str, Tensor]]:
    schedule = {"schedule": "linear", "warmup_steps": 3, "decay_steps": 20}
    grpo = _grpo(
        checkpoint, replace(FOUR_UPDATES, mini_batches=3), initialize_parallel(Layout(dp=2)), {}, {**schedule, **SHARDED}
    )
    if resumed:
        assert load_checkpoint(grpo.trainer, directory).step == 2
        assert grpo.trainer.scheduler.num_steps == 2 * 6
    else:
        for step in (1, 2):
            grpo.update(_rollouts(step), step)
        save_checkpoint(grpo.trainer, directory, 2)
    metrics = [grpo.update(_rollouts(step), step) for step in (3, 4)]
    return metrics, _weights(grpo, checkpoint)


def test_a_resumed_run_goes_on_bit_for_bit(scratch: Path, tmp_path: Path) -> None:
    checkpoint = saved_model(DENSE, scratch)
    undisturbed, resumed = (run_ranks(_steps, 2, checkpoint, tmp_path, again) for again in (False, True))
    for (metrics, weights), (metrics_again, weights_again) in zip(undisturbed, resumed, strict=True):
        assert metrics_again == metrics
        assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())
