"""Training on families that differ in what a trainer touches: output layers, latent attention, sinks, experts' biases, dropout,
recurrent layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import dense, experts, hybrid
from families.family import Family
from ranks import RankError, run_ranks
from tolerance import assert_near
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.checkpoint.saved_state import load_checkpoint, save_checkpoint
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

pytestmark = pytest.mark.slow
FAMILIES = {family.variant: family for family in (*dense.FAMILIES, *experts.FAMILIES, *hybrid.FAMILIES)}
PACKED = {"packing": True, "micro_batch_tokens": 40}


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 515, (count,), generator=generator).tolist()

    prompts, completions = [tokens(2 + row) for row in range(5)], [tokens(count) for count in (9, 3, 12, 1, 6)]
    return Batch.from_completions(prompts, completions, pad_token_id=0)


def _two_steps(
    rank: int, source: Path, layout: Layout, config: dict[str, Any], save: Path | None, load: Path | None
) -> tuple[Tensor, list[float]]:
    """Log-probabilities, and the losses of the steps that are left until the second."""
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(source)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-3, epsilon=1e-3, micro_batch_size=2, **config))
    log_probs = trainer.compute_log_probs(_batch()).log_probs
    losses = []
    if load is not None:
        load_checkpoint(trainer, load)
    else:
        losses.append(trainer.step(_batch(), supervised_loss).loss)
    if save is not None:
        save_checkpoint(trainer, save, 1)
    losses.append(trainer.step(_batch(), supervised_loss).loss)
    return log_probs, losses


@pytest.mark.parametrize("variant", ["seed-oss", "gemma2", "phi3-longrope", "deepseek-v3", "gpt-oss", "nemotron-h"])
def test_families_train_pack_and_resume_elsewhere(variant: str, tmp_path: Path) -> None:
    family: Family = FAMILIES[variant]
    network, batch, source = family.checkpoint(tmp_path / "model"), _batch(), tmp_path / "model"
    with torch.no_grad():
        log_p = network(batch.tokens).logits.float().log_softmax(-1)
    expected = log_p.gather(-1, batch.need("targets")[..., None])[..., 0][batch.mask]
    log_probs, losses = run_ranks(_two_steps, 1, source, Layout(), {}, tmp_path / "run", None)[0]
    assert_near(log_probs[batch.mask], expected, family.tolerance, what="log-probabilities")
    _, resumed = run_ranks(_two_steps, family.layout.world_size, source, family.layout, {}, None, tmp_path / "run")[0]
    assert_near(resumed, losses[1:], family.tolerance, what="losses on another layout")
    if family in hybrid.FAMILIES:
        with pytest.raises(RankError, match="would carry its state from one packed sequence into the next"):
            run_ranks(_two_steps, 1, source, Layout(), PACKED, None, None)
        return
    packed_log_probs, packed_losses = run_ranks(_two_steps, 1, source, Layout(), PACKED, None, None)[0]
    assert_near(packed_log_probs[batch.mask], log_probs[batch.mask], family.tolerance, what="packed log-probabilities")
    assert_near(packed_losses, losses, family.tolerance, what="packed losses")
