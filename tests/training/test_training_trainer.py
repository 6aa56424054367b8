"""The trainer on every parallel axis: the losses, gradients and log-probabilities of one process, and of Transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_checks import experts_apart
from ranks import RankError, run_ranks
from tiny import DENSE as SIZES
from tiny import saved_model, tiny_model
from tolerance import assert_near, assert_trained_near, backward, forward, rounding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch, TokenStatistics
from mbridge_rl.training.objectives.loss import GRPOConfig, grpo_loss, policy_metrics, supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

STEPS = 3
LAYERS, WIDTH = SIZES["num_hidden_layers"], SIZES["intermediate_size"]
FORWARD, BACKWARD = forward(LAYERS, WIDTH), backward(LAYERS, WIDTH)
SMOOTH = {"epsilon": 1e-3}  # far above the rounding of gradients, so that what is learned depends on them smoothly


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


def _batch(rows: int = 7, length: int = 13) -> Batch:
    """Rows and lengths that nothing divides; completions of one token up to all of the row, so that every rank of a sequence
    split has tokens that count."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 515, (count,), generator=generator).tolist()

    prompts = [tokens(3 + row % 3) for row in range(rows)]
    completions = [tokens(length - 3 - row % 3 if row % 2 else 1 + row % 4) for row in range(rows)]
    return Batch.from_completions(prompts, completions, pad_token_id=0, length=length)


def _trainer(checkpoint: Path, layout: Layout, build: dict[str, Any], config: dict[str, Any]) -> MegatronTrainer:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout, **build)
    bridge.load_weights(model)
    return MegatronTrainer(model, TrainerConfig(**{"learning_rate": 1e-3, **config}))


def _supervised(rank: int, checkpoint: Path, layout: Layout, build: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    trainer, batch = _trainer(checkpoint, layout, build, SMOOTH | config), _batch()
    before = trainer.compute_log_probs(batch)
    reports = [trainer.step(batch, supervised_loss) for _ in range(STEPS)]
    return {
        "loss": [report.loss for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
        "before": before.log_probs,
        "same_in_step": all(torch.equal(a, b) for a, b in zip(before, reports[0].statistics, strict=True)),
        "entropy": before.entropy,
        "greedy": before.greedy,
    }


DENSE, MOE = "qwen3-tied", "qwen3-moe"  # tied: pipelines reduce the embedding's gradient over their two ends
SP = {"sequence_parallel": True}
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
LAYOUTS: list[tuple[str, Layout, dict[str, Any], dict[str, Any]]] = [
    (DENSE, Layout(), {}, {"micro_batch_size": 2}),
    (DENSE, Layout(tp=2), SP, {"micro_batch_size": 3}),
    (DENSE, Layout(dp=2), {}, {"micro_batch_size": 2, **SHARDED}),
    (DENSE, Layout(dp=2, cp=2), {"overrides": {"calculate_per_token_loss": True}}, {"micro_batch_size": 2}),
    (DENSE, Layout(pp=2, vpp=2), {}, {"micro_batch_size": 2}),
    (DENSE, Layout(dp=2, pp=2), {}, {"micro_batch_size": 2, **SHARDED}),
    (MOE, Layout(tp=2, ep=2, etp=1), {}, {"micro_batch_size": 2}),
    (MOE, Layout(tp=2, etp=1), {}, {"micro_batch_size": 2}),  # experts replicated over tensor parallel ranks
    (MOE, Layout(dp=2, etp=2), {}, {"micro_batch_size": 2}),  # experts cut over data parallel ranks
    (MOE, Layout(tp=2, pp=2, etp=1), {}, {"micro_batch_size": 2}),
]


@cache
def _alone(variant: str, scratch: Path) -> dict[str, Any]:
    return run_ranks(_supervised, 1, saved_model(variant, scratch), Layout(), {}, {})[0]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "layout", "build", "config"), LAYOUTS, ids=str)
def test_training_equals_one_process(
    variant: str, layout: Layout, build: dict[str, Any], config: dict[str, Any], scratch: Path
) -> None:
    """The loss is normalised by the global token count, so no split of the batch or the model changes it."""
    alone = _alone(variant, scratch)
    for result in run_ranks(_supervised, layout.world_size, saved_model(variant, scratch), layout, build, config):
        assert result["same_in_step"]  # to the bit: forward only, and training
        assert_near(result["loss"], alone["loss"], FORWARD, what="losses")
        assert_near(result["grad_norm"], alone["grad_norm"], STEPS * BACKWARD, what="norms")  # each sees the errors before it
        assert_near(result["before"], alone["before"], FORWARD, what="log-probabilities")
        # Entropies are sums of p log p over the vocabulary, so they are as exact as the log-probabilities.
        assert_near(result["entropy"], alone["entropy"], FORWARD, scale=alone["before"].abs().max().item(), what="entropies")
        assert torch.equal(result["greedy"], alone["greedy"])


@pytest.mark.parametrize("variant", [DENSE, MOE, "llama"])
def test_loss_gradient_and_log_probs_equal_transformers(variant: str, scratch: Path) -> None:
    batch, network = _batch(), tiny_model(variant)
    log_p = network(batch.tokens).logits.log_softmax(-1)
    log_probs = log_p.gather(-1, batch.need("targets")[..., None])[..., 0]
    loss = -log_probs[batch.mask].mean()
    loss.backward()
    grad_norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    result = _alone(variant, scratch)
    assert_near(result["loss"][0], loss.item(), FORWARD, what="loss")
    assert_near(result["grad_norm"][0], grad_norm.item(), BACKWARD, what="norm")
    assert_near(result["before"][batch.mask], log_probs[batch.mask], FORWARD, what="log-probabilities")


def _first_grpo_step(rank: int, checkpoint: Path, layout: Layout, config: dict[str, Any]) -> list[Any]:
    trainer, batch = _trainer(checkpoint, layout, {}, config), _batch()
    generator = torch.Generator().manual_seed(1)
    batch = batch.with_tensors(advantages=batch.spread(torch.randn(len(batch), generator=generator)))
    old = trainer.compute_log_probs(batch).log_probs
    settings = GRPOConfig(kl_coefficient=0.1)
    trainer.snapshot_reference()
    metrics, norms, reference_is_old = [], [], []
    for _ in range(2):
        reference = trainer.reference_log_probs(batch)
        reference_is_old.append(torch.equal(reference, old))
        prepared = batch.with_tensors(old_log_probs=old, reference_log_probs=reference)
        report = trainer.step(prepared, grpo_loss(settings))
        metrics.append(policy_metrics(report.statistics.log_probs, prepared, settings))
        norms.append(report.grad_norm)
    return [metrics, reference_is_old, norms]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(dp=2), Layout(pp=2)], ids=str)
def test_the_first_ratio_is_exactly_one_and_the_reference_stays(layout: Layout, scratch: Path) -> None:
    results = run_ranks(_first_grpo_step, layout.world_size, saved_model(DENSE, scratch), layout, {"micro_batch_size": 2})
    for metrics, reference_is_old, norms in results:
        assert metrics[0].pop("ratio_mean") == 1.0
        assert set(metrics[0].values()) == {0.0}  # deviation, clip fractions, ppo_kl and policy_kl, exactly
        assert metrics[1]["ratio_max_deviation"] > 1e-4  # the step did something
        assert reference_is_old == [True, True]  # although the policy has moved
        assert norms[0] > 0


def _bf16(rank: int, checkpoint: Path, layout: Layout) -> tuple[list[float], bool]:
    trainer, batch = _trainer(checkpoint, layout, {"dtype": torch.bfloat16}, {"micro_batch_size": 2, **SMOOTH}), _batch()
    before = trainer.compute_log_probs(batch).log_probs
    reports = [trainer.step(batch, supervised_loss) for _ in range(4)]
    return [report.loss for report in reports], torch.equal(before, reports[0].statistics.log_probs)


def test_bf16_trains_with_fp32_masters(scratch: Path) -> None:
    # Activations are rounded to bf16 at every stage, sums are kept in fp32: one term.
    expected, bf16_loss = _alone(DENSE, scratch)["loss"], forward(LAYERS, 1, torch.bfloat16)
    for losses, same in run_ranks(_bf16, 2, saved_model(DENSE, scratch), Layout(tp=2)):
        assert same
        assert_near(losses[:STEPS], expected, bf16_loss)
        assert losses[3] < losses[0]


CLIPPING = {"clip_grad": 0.01, "learning_rate": 0.1, "epsilon": 1e-2, "micro_batch_size": 2}


def _clipped_step(
    rank: int, checkpoint: Path, layout: Layout, build: dict[str, Any], config: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    trainer = _trainer(checkpoint, layout, build, CLIPPING | config)
    norm = trainer.step(_batch(), supervised_loss).grad_norm
    return norm, {name: weight.clone() for name, weight in AutoBridge.from_pretrained(checkpoint).export_weights(trainer.model)}


@cache
def _clipped_by_torch() -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The norm of Transformers' gradient, weights, and what Adam's first step adds to them once the gradient is clipped."""
    network, batch = tiny_model(MOE), _batch()
    log_p = network(batch.tokens).logits.log_softmax(-1).gather(-1, batch.need("targets")[..., None])[..., 0]
    (-log_p[batch.mask].mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), CLIPPING["clip_grad"]).item()
    named = dict(network.named_parameters())
    moved = {
        name: -CLIPPING["learning_rate"] * parameter.grad / (parameter.grad.abs() + CLIPPING["epsilon"])
        for name, parameter in named.items()
        if parameter.grad is not None
    }
    assert moved.keys() == named.keys()
    return norm, experts_apart({name: parameter.detach() for name, parameter in named.items()}), experts_apart(moved)


@pytest.mark.parametrize(
    ("layout", "build", "config"),
    [
        (Layout(), {}, {}),
        (Layout(tp=2, ep=2, etp=1), SP, {}),
        (Layout(dp=2, ep=2), {}, SHARDED),
        (Layout(pp=2), {}, {}),
    ],
    ids=str,
)
def test_gradients_are_clipped_by_the_norm_of_the_whole_model(
    layout: Layout, build: dict[str, Any], config: dict[str, Any], scratch: Path
) -> None:
    """One norm counts experts and dense parameters, although Megatron gives each an optimizer of its own."""
    norm, before, moved = _clipped_by_torch()
    assert norm > 10 * CLIPPING["clip_grad"]
    for clipped_norm, weights in run_ranks(_clipped_step, layout.world_size, saved_model(MOE, scratch), layout, build, config):
        assert_near(clipped_norm, norm, BACKWARD, what="norm")
        for name, expected in moved.items():
            # The clipping factor has the error of the norm.
            assert_trained_near(weights[name], before[name] + expected, before[name], 2 * BACKWARD, updates=1, what=name)


def _after_a_step(rank: int, checkpoint: Path, rate: float) -> list[Tensor]:
    trainer, batch = _trainer(checkpoint, Layout(), {}, {}), _batch()
    trainer.set_learning_rate(rate)
    trainer.step(batch, supervised_loss)
    return [parameter.detach() for parameter in trainer.model[0].parameters()]


def test_the_learning_rate_can_be_changed(scratch: Path) -> None:
    checkpoint = saved_model(DENSE, scratch)
    still, moved = (run_ranks(_after_a_step, 1, checkpoint, rate)[0] for rate in (0.0, 1e-3))
    differences = [(a - b).abs().max().item() for a, b in zip(still, moved, strict=True)]
    # Adam's first step is the learning rate times g / (|g| + epsilon) of a gradient of 1e-5 and more, added to a weight near 1.
    assert_near(max(differences), 1e-3, 1e-3 + rounding(1) / 1e-3)


def _misuse(rank: int, checkpoint: Path, what: str) -> None:
    trainer, batch = _trainer(checkpoint, Layout(), {}, {}), _batch()
    if what == "mask":
        trainer.step(batch.with_tensors(mask=torch.zeros_like(batch.mask)), supervised_loss)
    trainer.reference_log_probs(batch)


def test_misuse_says_what_is_wrong(scratch: Path) -> None:
    for what, message in {"mask": "no token of the batch", "reference": "call snapshot_reference"}.items():
        with pytest.raises(RankError, match=message):
            run_ranks(_misuse, 1, saved_model(DENSE, scratch), what)


def _rates(rank: int, checkpoint: Path, config: dict[str, Any], steps: int) -> list[float]:
    trainer, batch = _trainer(checkpoint, Layout(), {}, config), _batch(2, 8)
    return [trainer.step(batch, supervised_loss).learning_rate for _ in range(steps)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "decay_steps": 5, "min_learning_rate": 1e-4}, [0.82, 0.64, 0.46, 0.28, 0.1, 0.1]),
        ({"schedule": "cosine", "warmup_steps": 1, "decay_steps": 5}, [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]),
        ({"schedule": "inverse-square-root", "warmup_steps": 1}, [1.0, 0.707107, 0.577350, 0.5, 0.447214, 0.408248]),
    ],
    ids=str,
)
def test_learning_rates_follow_the_schedule(config: dict[str, Any], expected: list[float], scratch: Path) -> None:
    rates = run_ranks(_rates, 1, saved_model(DENSE, scratch), config, 6)[0]
    assert_near(rates, [1e-3 * rate for rate in expected], 1e-6)  # as many digits as are written here


class _BrokenGradient(torch.autograd.Function):
    """Passes a value on and makes its gradient infinite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.inf


def _skipped(rank: int, checkpoint: Path, layout: Layout, sharded: bool) -> None:
    trainer, batch = _trainer(checkpoint, layout, {}, {"distributed_optimizer": sharded, "warmup_steps": 4}), _batch()
    before = [parameter.detach().clone() for parameter in trainer.model[0].parameters()]
    first = tuple(batch.mask.nonzero()[0])
    token = batch.need("targets")[first]

    def undefined(policy: TokenStatistics, micro: Batch) -> Tensor:
        return torch.where(micro.need("targets") == token, torch.nan, policy.log_probs)

    def explosive(policy: TokenStatistics, micro: Batch) -> Tensor:
        return _BrokenGradient.apply(policy.log_probs)

    losses = {"the loss is not finite": undefined, "the gradient is not finite": explosive}
    for reason, loss in losses.items():
        report = trainer.step(batch, loss)
        assert not report.updated
        assert report.skipped == reason
        assert report.learning_rate == 0.0  # the schedule has not moved
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model[0].parameters(), strict=True))
    report = trainer.step(batch, supervised_loss)
    assert (report.updated, report.skipped, report.learning_rate) == (True, "", 1e-3 / 4)
    advantages = batch.spread(torch.ones(len(batch)))
    advantages[first] = torch.nan
    broken = batch.with_tensors(advantages=advantages, old_log_probs=torch.zeros_like(advantages))
    with pytest.raises(ValueError, match="advantages of 1 tokens are not finite, first in row 0"):
        trainer.step(broken, grpo_loss(GRPOConfig()))
    nothing = batch.without_rows(torch.ones(len(batch), dtype=torch.bool))
    assert trainer.compute_log_probs(nothing).log_probs.shape == batch.tokens.shape
    assert trainer.compute_log_probs(batch.rows(slice(0, 0))).log_probs.shape == (0, batch.tokens.shape[1])
    with pytest.raises(ValueError, match="no token of the batch"):
        trainer.step(nothing, supervised_loss)


@pytest.mark.parametrize(("layout", "sharded"), [(Layout(tp=2), False), (Layout(dp=2), True)], ids=str)
def test_numbers_that_are_none_change_nothing(layout: Layout, sharded: bool, scratch: Path) -> None:
    run_ranks(_skipped, layout.world_size, saved_model(DENSE, scratch), layout, sharded)


def _too_long(rank: int, checkpoint: Path, config: dict[str, Any]) -> None:
    _trainer(checkpoint, Layout(), {}, config).step(_batch(), supervised_loss)


def test_over_long_sequences_are_refused(scratch: Path) -> None:
    checkpoint = saved_model(DENSE, scratch)
    with pytest.raises(RankError, match="row 1 has 12 tokens, a micro-batch holds 10: raise micro_batch_tokens"):
        run_ranks(_too_long, 1, checkpoint, {"packing": True, "micro_batch_tokens": 10})
    with pytest.raises(RankError, match="rows have 13 tokens, a micro-batch holds 12: raise micro_batch_tokens"):
        run_ranks(_too_long, 1, checkpoint, {"micro_batch_tokens": 12})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"schedule": "wave"}, "unknown schedule 'wave'"),
        ({"schedule": "cosine"}, "needs decay_steps=None beyond warmup_steps=0"),
        ({"schedule": "linear", "warmup_steps": 5, "decay_steps": 5}, "decay_steps=5 beyond warmup_steps=5"),
        ({"decay_steps": 5}, "schedule 'constant' does not end"),
        ({"min_learning_rate": 1.0}, "min_learning_rate=1.0 <= learning_rate"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ],
)
def test_contradictory_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**config)


class _Logits(TorchDispatchMode):
    """The most elements that any `[..., vocab]` had (the output weight, transposed, is none), and how many tokens were
    projected."""

    elements = projected = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (515,) and tensor.shape[0] != 64:
                self.elements = max(self.elements, tensor.numel())
                self.projected += len(tensor) if func is torch.ops.aten.mm.default else 0
        return out


def _seen_logits(rank: int, checkpoint: Path, hook: bool) -> tuple[int, int]:
    trainer = _trainer(checkpoint, Layout(), {}, {"micro_batch_size": 7, "max_logit_elements": 4000})
    if hook:
        unwrap(trainer.model)[0].output_layer.register_forward_hook(lambda *_: None)
    with _Logits() as seen:
        trainer.step(_batch(), supervised_loss)
    return seen.elements, seen.projected


def test_logits_never_exist_as_a_whole_and_only_where_a_token_counts(scratch: Path) -> None:
    checkpoint = saved_model(DENSE, scratch)
    most, projected = run_ranks(_seen_logits, 1, checkpoint, False)[0]
    assert 0 < most <= 4000
    assert projected == 2 * _batch().num_tokens  # forward, and again in the backward pass
    assert run_ranks(_seen_logits, 1, checkpoint, True)[0][0] == 7 * 13 * 515  # a user's hook must see what Megatron makes
