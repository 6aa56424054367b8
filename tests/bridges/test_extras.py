"""Models with every extra, trained: log-probabilities and all gradients of one process on every parallel axis, recomputed,
packed and with parallel sequences. That single extras compute what Transformers does is asked in test_families.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tolerance import assert_gradients_near, assert_near, backward, forward

from mbridge_rl import bridges
from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, gated_mlp, output_norms, projection_norms
from mbridge_rl.core import extras
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

VOCABULARY, LAYERS, HIDDEN, HEAD_DIM = 99, 3, 48, 16


def _frequencies(theta: float) -> tuple[float, ...]:
    return tuple(theta ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2))


def _normed(hf: Any) -> ModelSpec:
    """Norms on both sides, biases, capped scores and logits, scaled everything, a rotation per layer."""
    windows = Block({"window_size": (4, 0), "window_attn_skip_freq": [1, 0, 1], "layernorm_zero_centered_gamma": True})
    more = (
        extras.EmbeddingScale(3.0),
        extras.ResidualScale(0.7),
        extras.AttentionSoftcap(1.5),
        extras.LogitScale(0.5),
        extras.LogitSoftcap(2.0),
        extras.RotaryFrequenciesByLayer((_frequencies(100.0), _frequencies(5000.0)), (0, 1, 0)),
    )
    blocks = (attention(hf, qk_norm=True), gated_mlp(hf, norm="pre_feedforward_layernorm"), output_norms(hf), windows)
    return decoder(hf, *blocks, extras=more)


def _unnormed(hf: Any) -> ModelSpec:
    """No norms before attention and MLP, frequencies by length, queries scaled, a layer without positions."""
    more = (
        extras.RotaryFrequenciesByLength(_frequencies(100.0), _frequencies(5000.0), original_length=9),
        extras.RotaryScale(1.4, channels=HEAD_DIM // 2),
        extras.QueryScaleByPosition(0.3, original_length=4),
        extras.MlpScale(0.6),
    )
    positions = Block({"no_rope_freq": [0, 1, 0]})
    blocks = (attention(hf, norm=None), projection_norms(hf), gated_mlp(hf, norm=None), output_norms(hf), positions)
    return decoder(hf, *blocks, extras=more)


MODELS = {"normed": _normed, "unnormed": _unnormed}


@pytest.fixture(autouse=True)
def families() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, family in MODELS.items():
            patch.setitem(bridges.FAMILIES, name, family)
        yield


def test_the_models_have_every_extra_of_dense_models() -> None:
    present = {type(extra) for name in MODELS for extra in _bridge(name).spec.extras}
    of_others = {extras.Routing, extras.PlainNorm, extras.MambaBesideAttention, extras.TextOnly}
    of_others |= {extras.LatentNormEpsilon, extras.TimeStepMinimum}  # test_numerics.py
    assert present | of_others | {extras.RotaryFrequencies} == set(extras.Extra.__args__)


def _bridge(name: str) -> AutoBridge:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        attention_bias=True,
        attention_dropout=0.5,  # no business of a policy that samples without
        mlp_bias=True,
        tie_word_embeddings=name == "normed",
    )
    config.architectures = [name]
    return AutoBridge.from_config(config)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in (16, 9, 13, 5)]
    return Batch.from_completions([row[:2] for row in rows], [row[2:] for row in rows], pad_token_id=0, length=16)


def _train(rank: int, name: str, layout: Layout, build: dict[str, Any], config: dict[str, Any]) -> tuple[Any, ...]:
    """Log-probabilities, the losses of two steps, and the gradients of the first by HF name."""
    initialize_parallel(layout)
    bridge, generator = _bridge(name), torch.Generator().manual_seed(1)
    weights = {
        hf_name: torch.randn(shape, generator=generator) * shape[-1] ** (-0.5 if len(shape) > 1 else -0.3)
        for hf_name, shape in bridge.spec.hf_shapes.items()
    }
    model, batch = bridge.build_model(layout, **build), _batch()
    bridge.load_weights(model, weights)
    trainer = MegatronTrainer(model, TrainerConfig(**{"learning_rate": 1e-3, "epsilon": 1e-3, **config}))
    log_probs = trainer.compute_log_probs(batch).log_probs
    losses = [trainer.step(batch, supervised_loss).loss for _ in range(2)]
    bridge.load_weights(trainer.model, weights)
    trainer.compute_gradients(batch, supervised_loss)
    for chunk in trainer.model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return log_probs, losses, dict(bridge.export_weights(trainer.model))


@cache
def _alone(name: str) -> tuple[Any, ...]:
    return run_ranks(_train, 1, name, Layout(), {}, {})[0]


SP = {"sequence_parallel": True}
FULL = {"overrides": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}}
SELECTIVE = {"overrides": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}}
LAYOUTS = {
    "tp2-recompute": (Layout(tp=2), FULL, {}),
    "tp2-sp-recompute": (Layout(tp=2), SP | FULL, {}),
    "tp4-sp-selective": (Layout(tp=4), SP | SELECTIVE, {}),
    "cp2": (Layout(cp=2), {}, {"micro_batch_size": 2}),
    "cp2-packed": (Layout(cp=2), FULL, {"packing": True}),
    "tp2-pp2-packed": (Layout(tp=2, pp=2, stage_layers=(1, 2)), SP, {"packing": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_one_process(name: str, layout: str) -> None:
    (log_probs, losses, gradients), (where, build, config) = _alone(name), LAYOUTS[layout]
    assert losses[1] < losses[0]
    counted = _batch().mask
    for found_log_probs, found_losses, found_gradients in run_ranks(_train, where.world_size, name, where, build, config):
        assert_near(found_log_probs[counted], log_probs[counted], forward(LAYERS, HIDDEN), what="log-probabilities")
        assert_near(found_losses, losses, forward(LAYERS, HIDDEN), what="losses")
        assert all(gradient.any() for gradient in gradients.values())
        assert_gradients_near(found_gradients, gradients, backward(LAYERS, HIDDEN))
