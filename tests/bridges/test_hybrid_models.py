"""Mamba layers in training: packed sequences, and gradients on a sharded layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from ranks import RankError, run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state
from tolerance import assert_gradients_near, assert_near, backward
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import model_spec
from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.versions.batches import packed_sequences, require_context_parallel_delta_nets
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.gradients import hf_gradients
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

LAYERS, WIDTH = 4, 256  # of the deepest and the widest of these models
LENGTHS = (7, 11, 5)  # none a multiple of the convolution's width or of a chunk


@pytest.mark.parametrize("variant", ["nemotron-h", "falcon-h1"])
def test_packed_sequences_do_not_see_each_other(variant: str, tmp_path: Path) -> None:
    """Neither by attention, nor by the convolution, nor by the state."""
    FAMILIES[variant].checkpoint(tmp_path)
    [(packed, apart)] = run_ranks(packed_and_apart, 1, tmp_path)
    assert_near(packed, apart, FAMILIES[variant].tolerance, what="logits")


def packed_and_apart(rank: int, directory: Path) -> tuple[Tensor, Tensor]:
    initialize_parallel(ParallelLayout())
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model()
    bridge.load_weights(model)
    sequences = torch.randint(0, 515, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1)).split(LENGTHS, dim=1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    offsets = (0, *torch.tensor(LENGTHS).cumsum(0).tolist())
    with megatron_runtime(), torch.no_grad():
        params = packed_sequences(offsets, torch.device("cpu"))
        packed = model[0](torch.cat(sequences, 1), positions, None, packed_seq_params=params)
    apart = torch.cat([forward_logits(model, tokens) for tokens in sequences], 1)
    return packed[..., :515].float(), apart


@pytest.mark.parametrize("variant", ["nemotron-h", "qwen3.5", "falcon-h1"])
def test_gradients_do_not_depend_on_the_layout(variant: str, tmp_path: Path) -> None:
    """Tensor and sequence parallel ranks hold the shards of the same gradients."""
    FAMILIES[variant].checkpoint(tmp_path)
    [expected] = run_ranks(gradients, 1, tmp_path, ParallelLayout())
    sharded, _ = run_ranks(gradients, 2, tmp_path, ParallelLayout(tp=2))
    assert all(gradient.any() for gradient in expected.values())
    assert_gradients_near(sharded, expected, backward(LAYERS, WIDTH))


def gradients(rank: int, directory: Path, layout: ParallelLayout) -> dict[str, Tensor]:
    """Of the mean log-probability, by HF name. By the trainer: Megatron's own loss counts the rows that pad a vocabulary."""
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, sequence_parallel=True)
    bridge.load_weights(model)
    tokens = torch.randint(0, 515, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = Batch.from_completions(tokens[:, :1].tolist(), tokens[:, 1:].tolist(), pad_token_id=0)
    trainer = MegatronTrainer(model, TrainerConfig())
    trainer.compute_gradients(batch, supervised_loss)
    return {name: gradient.clone() for name, gradient in hf_gradients(trainer, bridge).items()}


@pytest.mark.parametrize(
    ("variant", "changes", "layout", "message"),
    [
        ("nemotron-h", {}, ParallelLayout(pp=2, vpp=2, stage_layers=(2, 1, 1, 1)), "vpp=2: Megatron's MambaModel has no"),
        ("nemotron-h", {"n_groups": 6}, ParallelLayout(tp=4), "6 Mamba groups do not divide by tp=4"),
    ],
)
def test_layouts_that_megatron_cannot_run_are_refused(
    variant: str, changes: dict[str, int], layout: ParallelLayout, message: str
) -> None:
    family = FAMILIES[variant]
    spec = model_spec(replace(family, config={**family.config, **changes}).hf_config())
    with pytest.raises(LayoutError, match=message):
        spec.validate(layout)


def test_delta_nets_divide_sequences_or_refuse(tmp_path: Path) -> None:
    """Gated delta nets divide sequences since Megatron-core 0.18. Older releases refuse such a model when it is built:
    its weights do not depend on the context-parallel axis, so nothing else would notice."""
    FAMILIES["qwen3.5"].checkpoint(tmp_path)
    context_parallel = ParallelLayout(cp=2)
    if not divides_sequences():
        with pytest.raises(RankError, match=r"cp=2: gated delta nets have context parallelism since Megatron-core 0\.18"):
            run_ranks(gradients, 2, tmp_path, context_parallel)
        return
    [expected] = run_ranks(gradients, 1, tmp_path, ParallelLayout())
    sharded, _ = run_ranks(gradients, 2, tmp_path, context_parallel)
    assert_gradients_near(sharded, expected, backward(LAYERS, WIDTH))


def divides_sequences() -> bool:
    with megatron_runtime():
        from megatron.core.ssm import gated_delta_net

        return hasattr(gated_delta_net, "tensor_a2a_cp2hp")


def test_delta_nets_need_a_head_for_every_rank() -> None:
    if not divides_sequences():
        pytest.skip("gated delta nets have context parallelism since Megatron-core 0.18")
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    with megatron_runtime():
        require_context_parallel_delta_nets(heads, ParallelLayout(tp=2, cp=2))
        with pytest.raises(LayoutError, match=r"linear_num_key_heads=4 of gated delta nets does not divide by tp\*cp=4\*2"):
            require_context_parallel_delta_nets(heads, ParallelLayout(tp=4, cp=2))


def test_tied_embeddings_that_no_such_model_has_are_refused() -> None:
    config = replace(FAMILIES["nemotron-h"], config={**FAMILIES["nemotron-h"].config, "tie_word_embeddings": True}).hf_config()
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings=True is not supported"):
        model_spec(config)


def test_the_embedding_of_checkpoints_that_older_releases_of_transformers_saved(tmp_path: Path) -> None:
    """It has another name there, and keeps it in exports; the weights are the same."""
    FAMILIES["nemotron-h"].checkpoint(tmp_path)
    state = hf_state(tmp_path)
    [found] = {"backbone.embeddings.weight", "backbone.embedding.weight"} & state.keys()
    for name in ("backbone.embeddings.weight", "backbone.embedding.weight"):
        renamed = {name if other == found else other: tensor for other, tensor in state.items()}
        save_file(renamed, tmp_path / "model.safetensors")
        bridge = AutoBridge.from_pretrained(tmp_path)
        shards = bridge.shard(renamed, ParallelLayout(tp=2))
        assert_same_state(bridge.unshard(shards, ParallelLayout(tp=2)), renamed)
