"""One GRPO step on every layout: loss and gradients are those of one process, and of Transformers with the papers' formulas."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_checks import experts_apart
from ranks import run_ranks
from tiny import DENSE as SIZES
from tiny import saved_model, tiny_model
from tolerance import assert_near, assert_near_in_norm, forward, ratio_gradients
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.config import GRPOConfig, objective
from mbridge_rl.training.objectives.correction import ImportanceCorrection
from mbridge_rl.training.objectives.loss import grpo_loss, policy_metrics
from mbridge_rl.training.objectives.prepare import prepare_batch, select_rows
from mbridge_rl.training.trainer.gradients import hf_gradients
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

ROWS, GROUP, LENGTH, TEMPERATURE = 8, 4, 15, 1.3
DENSE, MOE = "qwen3-tied", "qwen3-moe"
LAYERS, WIDTH = SIZES["num_hidden_layers"], SIZES["intermediate_size"]

CONFIGS = {
    "all": GRPOConfig(  # token ratio, dual clip, KL in the loss, entropy, importance weights, sequence means
        group_size=GROUP,
        dual_clip=3.0,
        aggregation="seq-mean-token-mean",
        kl_coefficient=0.1,
        entropy_coefficient=0.02,
        correction=ImportanceCorrection(weight="sequence", cap=1.5),
    ),
    "gspo": objective("gspo", group_size=GROUP, clip_low=0.1, clip_high=0.1),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo_step")


def _rollouts() -> tuple[Batch, Tensor]:
    """Sequences of many lengths; one completion has a single token, one reaches to the end, one reward is unknown."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 515, (count,), generator=generator).tolist()

    prompts = [tokens(2 + row % 4) for row in range(ROWS)]
    completions = [tokens(count) for count in (1, 10, 6, 3, 11, 2, 7, 10)]
    batch = Batch.from_completions(prompts, completions, pad_token_id=0, length=LENGTH)
    rewards = torch.randn(ROWS, generator=generator)
    rewards[2] = float("nan")
    return batch, rewards


def _noise(batch: Batch, seed: int) -> Tensor:
    return torch.where(batch.mask, 0.1 * torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(seed)), 0.0)


def _prepared(config: GRPOConfig, log_probs: Tensor) -> Batch:
    """Old, engine's and reference policies are the given one with noise, so that ratios are everywhere; good completions have
    become likelier than bad ones, so that the loss does not cancel."""
    batch, rewards = _rollouts()
    old = log_probs + _noise(batch, 1) - 0.1 * batch.spread(rewards.nan_to_num().sign())
    batch = batch.with_tensors(
        old_log_probs=old,
        rollout_log_probs=old + _noise(batch, 2),
        reference_log_probs=log_probs + _noise(batch, 3),
    )
    selection = select_rows(config, batch, rewards)
    return prepare_batch(config, selection.batch, selection.rewards).batch


def _trainer(checkpoint: Path, layout: Layout, build: dict[str, Any], config: dict[str, Any]) -> MegatronTrainer:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout, **build)
    bridge.load_weights(model)
    return MegatronTrainer(model, TrainerConfig(**{"learning_rate": 1e-3, "temperature": TEMPERATURE, **config}))


def _step(
    rank: int, checkpoint: Path, layout: Layout, build: dict[str, Any], config: dict[str, Any], log_probs: Tensor
) -> dict[str, Any]:
    trainer = _trainer(checkpoint, layout, build, config)
    bridge = AutoBridge.from_pretrained(checkpoint)
    results: dict[str, Any] = {}
    for name, settings in CONFIGS.items():
        seen = trainer.compute_gradients(_prepared(settings, log_probs), grpo_loss(settings))
        gradients = hf_gradients(trainer, bridge)
        results[name] = (seen.loss, gradients if rank == 0 else {}, seen.statistics.log_probs)
    return results


def _reference(variant: str) -> tuple[Tensor, dict[str, tuple[float, dict[str, Tensor], Tensor]]]:
    """Transformers in fp32, the loss sequence by sequence as the papers write it."""
    network = tiny_model(variant)
    batch, rewards = _rollouts()
    with torch.no_grad():
        before = _token_log_probs(network, batch)[0].float()
    results = {}
    for name, config in CONFIGS.items():
        network.zero_grad()
        log_probs, entropy = _token_log_probs(network, batch)
        prepared = _prepared(config, before)
        loss = _paper_loss(name, log_probs, entropy, prepared, rewards)
        loss.backward()
        gradients = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
        results[name] = (loss.item(), experts_apart(gradients), log_probs.detach())
    return before, results


def _token_log_probs(network: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    log_p = (network(batch.tokens).logits.float() / TEMPERATURE).log_softmax(-1)
    targets = batch.tokens.roll(-1, dims=1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def _paper_loss(name: str, log_probs: Tensor, entropy: Tensor, batch: Batch, rewards: Tensor) -> Tensor:
    total, sequences = torch.zeros(()), [row for row in range(ROWS) if rewards[row].isfinite()]
    for row in sequences:
        group = rewards[row // GROUP * GROUP : row // GROUP * GROUP + GROUP]
        group = group[group.isfinite()]
        advantage = (rewards[row] - group.mean()) / (group.std() + 1e-6)
        own = batch.mask[row]
        policy, old = log_probs[row][own], batch.need("old_log_probs")[row][own]
        rollout, reference = batch.need("rollout_log_probs")[row][own], batch.need("reference_log_probs")[row][own]
        if name == "gspo":
            ratio = (policy.sum() - old.sum()).div(len(policy)).exp()
            total = total - torch.min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
            continue
        ratio, weight = (policy - old).exp(), (old - rollout).sum().exp().clamp(max=1.5)
        gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        gain = gain if advantage >= 0 else torch.max(gain, 3.0 * advantage)
        kl = (reference - policy).exp() - (reference - policy) - 1
        total = total + (-weight * gain + 0.1 * kl - 0.02 * entropy[row][own]).mean()
    return total / len(sequences)


@cache
def _expected(variant: str) -> tuple[Tensor, dict[str, tuple[float, dict[str, Tensor], Tensor]]]:
    return _reference(variant)


PACK = {"packing": True, "micro_batch_tokens": 24}
SP = {"sequence_parallel": True}
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
RECOMPUTE = {"overrides": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}}
LAYOUTS: list[tuple[str, Layout, dict[str, Any], dict[str, Any]]] = [
    (DENSE, Layout(), {}, {"micro_batch_size": 8}),
    (DENSE, Layout(), {}, {"micro_batch_size": 3}),
    (DENSE, Layout(), {}, {"micro_batch_tokens": 30}),  # two rows
    (DENSE, Layout(), {}, {"packing": True, "micro_batch_tokens": 200}),
    (DENSE, Layout(), {}, PACK),
    (DENSE, Layout(tp=2), SP, {"micro_batch_size": 2}),
    (DENSE, Layout(tp=2), {**SP, **RECOMPUTE}, PACK),
    (DENSE, Layout(tp=2), {}, {"micro_batch_size": 2, "max_logit_elements": 1000}),
    (DENSE, Layout(pp=2), {}, {"micro_batch_size": 2}),
    (DENSE, Layout(pp=2), {}, PACK),
    (DENSE, Layout(pp=2, vpp=2), {}, {"micro_batch_size": 2}),
    (DENSE, Layout(pp=2, vpp=2), {}, PACK),
    (DENSE, Layout(tp=2, pp=2, vpp=2), SP, PACK),
    (DENSE, Layout(cp=2), {}, {"micro_batch_size": 4}),
    (DENSE, Layout(cp=2), {}, PACK),
    (DENSE, Layout(tp=2, cp=2), SP, PACK),
    (DENSE, Layout(dp=2), {}, {"micro_batch_size": 2, **SHARDED}),
    (DENSE, Layout(dp=2), {}, {**PACK, **SHARDED}),
    (DENSE, Layout(dp=2, cp=2), {}, {**PACK, **SHARDED}),
    (MOE, Layout(), {}, PACK),
    (MOE, Layout(dp=2, ep=2), {}, {"micro_batch_size": 2}),
    (MOE, Layout(dp=2, ep=2), {}, {**PACK, **SHARDED}),
    (MOE, Layout(tp=2, ep=2, etp=1), {}, PACK),
    (MOE, Layout(dp=2, ep=1, etp=2), {}, PACK),
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout", "build", "config"), LAYOUTS, ids=str)
def test_loss_and_gradients_equal_the_papers_on_transformers(
    variant: str, layout: Layout, build: dict[str, Any], config: dict[str, Any], scratch: Path
) -> None:
    before, expected = _expected(variant)
    results = run_ranks(_step, layout.world_size, saved_model(variant, scratch), layout, build, config, before)
    batch = _rollouts()[0]
    for name, (loss, expected_gradients, log_probs) in expected.items():
        mask = _prepared(CONFIGS[name], before).mask
        assert mask.sum() < batch.mask.sum()
        for result in results:
            # The loss is a mean of ratios, which are exponentials of log-probabilities.
            assert_near(result[name][0], loss, forward(LAYERS, WIDTH), scale=log_probs[mask].abs().max().item(), what="loss")
            assert_near(result[name][2][mask], log_probs[mask], forward(LAYERS, WIDTH), what="log-probabilities")
        gradients = results[0][name][1]
        assert expected_gradients.keys() <= gradients.keys()
        for hf_name, gradient in expected_gradients.items():
            tolerance = ratio_gradients(log_probs[mask], LAYERS, WIDTH)
            assert_near_in_norm(gradients[hf_name], gradient, tolerance, what=f"{name}: {hf_name}")
            assert gradient.any()


def _exact(rank: int, checkpoint: Path, layout: Layout, config: dict[str, Any]) -> list[Any]:
    trainer = _trainer(checkpoint, layout, {}, config)
    trainer.snapshot_reference()
    results = []
    for settings in CONFIGS.values():
        selection = select_rows(settings, *_rollouts())
        batch = selection.batch
        old = trainer.compute_log_probs(batch).log_probs
        reference = trainer.reference_log_probs(batch)
        batch = batch.with_tensors(old_log_probs=old, rollout_log_probs=old, reference_log_probs=reference)
        prepared = prepare_batch(settings, batch, selection.rewards).batch
        report = trainer.compute_gradients(prepared, grpo_loss(settings))
        same = torch.equal(old[prepared.mask], report.statistics.log_probs[prepared.mask])
        results.append((same, torch.equal(reference, old), policy_metrics(report.statistics.log_probs, prepared, settings)))
    return results


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        (Layout(), {"micro_batch_size": 3}),
        (Layout(tp=2), PACK),
        (Layout(pp=2), PACK),
        (Layout(cp=2), PACK),
        (Layout(dp=2), {**PACK, **SHARDED}),
    ],
    ids=str,
)
def test_the_first_step_has_ratio_one_and_no_kl_exactly(layout: Layout, config: dict[str, Any], scratch: Path) -> None:
    for results in run_ranks(_exact, layout.world_size, saved_model(DENSE, scratch), layout, config):
        for same, reference_is_old, metrics in results:
            assert same
            assert reference_is_old
            assert metrics.pop("ratio_mean") == 1.0
            assert set(metrics.values()) == {0.0}
