"""Megatron models built and trained on every kind of layout, in real processes."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from tolerance import assert_near, forward, rounding
from torch import Tensor, nn

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.extras import RotaryFrequencies
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.model import build_model, unwrap
from mbridge_rl.megatron.parallel import current_layout, destroy_parallel, initialize_parallel
from mbridge_rl.megatron.versions.batches import batch_of_context_rank

HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, EXPERT_FFN, EXPERTS, LAYERS = 48, 4, 2, 12, 72, 20, 4, 4


def _spec(*, moe: bool = False, tied: bool = False, vocab: int = 100, layers: int = LAYERS) -> ModelSpec:
    config: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": HEAD_DIM,
        "ffn_hidden_size": FFN,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if moe:
        config |= {
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": EXPERT_FFN,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    return ModelSpec(
        architecture="TestForCausalLM",
        num_layers=layers,
        vocab_size=vocab,
        tied_embeddings=tied,
        num_experts=EXPERTS if moe else None,
        transformer_config=config,
        gpt_model={"max_sequence_length": 64, "position_embedding_type": "rope", "rotary_base": 10000},
        rules=(),
    )


def _global_name(name: str, layer_offset: int, expert_offset: int) -> str:
    """Layer and expert indices of the whole model, and one name for grouped and sequential experts."""
    name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m[0]) + layer_offset), name)
    name = re.sub(r"local_experts\.(\d+)\.(linear_fc\d\.weight)", r"\2\1", name)
    return re.sub(r"(?<=\.weight)\d+$", lambda m: str(int(m[0]) + expert_offset), name)


def _sharded_dimension(name: str) -> int | None:
    if re.search(r"word_embeddings|output_layer|linear_qkv\.(weight|bias)|linear_fc1\.weight", name):
        return 0
    return 1 if re.search(r"linear_proj\.weight|linear_fc2\.weight", name) else None


def _seed(name: str) -> int:
    return int(hashlib.md5(name.encode()).hexdigest()[:8], 16)


@torch.no_grad()
def _initialize(model: list[nn.Module]) -> dict[str, tuple[int, ...]]:
    """Gives every parameter its part of a full tensor that depends on its global name only; returns the full shapes."""
    from megatron.core import parallel_state as state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    shapes = {}
    for chunk in unwrap(model):
        layer_offset = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
        expert_offset = state.get_expert_model_parallel_rank() * EXPERTS // chunk.parallel_layout.ep
        for local_name, parameter in chunk.named_parameters():
            name = _global_name(local_name, layer_offset, expert_offset)
            if name == "output_layer.weight" and chunk.model_spec.tied_embeddings:
                name = "embedding.word_embeddings.weight"
            expert = ".experts." in name
            size = state.get_expert_tensor_parallel_world_size() if expert else state.get_tensor_model_parallel_world_size()
            rank = state.get_expert_tensor_parallel_rank() if expert else state.get_tensor_model_parallel_rank()
            dimension, shape = _sharded_dimension(name), list(parameter.shape)
            if dimension is not None:
                shape[dimension] *= size
            padding = shape[0] - chunk.model_spec.vocab_size if "word_embeddings" in name or "output_layer" in name else 0
            filled = [shape[0] - padding, *shape[1:]]
            full = torch.randn(filled, generator=torch.Generator().manual_seed(_seed(name))) * 0.1
            if "norm" in name:
                full += 1
            if padding:  # large values: whatever reads the padding gives wrong results
                full = F.pad(full, (0, 0, 0, padding), value=1e3)
            # Gate and up are two column-parallel matrices on top of each other: a rank has its part of each.
            matrices = full.chunk(2) if "linear_fc1.weight" in name else [full]
            parts = [matrix if dimension is None else matrix.chunk(size, dimension)[rank] for matrix in matrices]
            parameter.copy_(torch.cat(parts) if dimension is not None else full)
            shapes[name] = tuple(shape)
    return shapes


BATCH, SEQ, STEPS = 8, 16, 3


def _train(rank: int, layout: ParallelLayout, spec: ModelSpec, options: dict[str, Any], distributed_optimizer: bool) -> Any:
    """A few Adam steps through Megatron's schedule; the losses of the global batch, and the parameters' whole shapes."""
    with megatron_runtime():
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func

        initialize_parallel(layout)
        assert current_layout() == layout
        model = build_model(spec, layout, ddp={"use_distributed_optimizer": distributed_optimizer}, **options)
        shapes = _initialize(model)
        half = options.get("dtype", torch.float32) != torch.float32
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=2e-3,
                adam_eps=1e-3,  # far above the rounding of gradients, so that what is learned depends on them smoothly
                clip_grad=1.0,
                bf16=half,
                params_dtype=options.get("dtype", torch.float32),
                use_distributed_optimizer=distributed_optimizer,
            ),
            model,
        )
        config = unwrap(model)[0].config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        micro_batches = BATCH // 2 // layout.dp
        data_rank = layout.coordinates(rank).dp
        text = torch.randint(0, 100, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(5))
        mine = text.view(micro_batches, layout.dp, 2, SEQ + 1)[:, data_rank]

        def step(data: Any, chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
            rows = next(data)
            batch = {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}
            batch["position_ids"] = torch.arange(SEQ).expand(2, -1).contiguous()
            batch = batch_of_context_rank(batch)
            output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

            def loss(values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                # The schedule multiplies by cp: what it wants is this rank's share of the mean.
                share = values.float().mean() / layout.cp
                return share, {"loss": share.detach().clone()}

            return output, loss

        losses = []
        for _ in range(STEPS):
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            outputs = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(mine) for _ in model] if layout.vpp > 1 else iter(mine),
                model=model if layout.vpp > 1 else model[0],
                num_microbatches=micro_batches,
                seq_length=SEQ,
                micro_batch_size=2,
                forward_only=False,
            )
            optimizer.step()
            losses.append(_mean_loss(outputs, micro_batches, layout))
    destroy_parallel()
    return losses, shapes


def _mean_loss(outputs: list[dict[str, Tensor]], micro_batches: int, layout: ParallelLayout) -> float:
    """The loss of the global batch, on every rank: only last stages have outputs, and every tp rank has the same."""
    total = torch.stack([output["loss"] for output in outputs]).sum() / micro_batches if outputs else torch.zeros(())
    dist.all_reduce(total)
    return (total / (layout.tp * layout.dp)).item()


@cache
def _one_rank(moe: bool, tied: bool) -> tuple[list[float], dict[str, tuple[int, ...]]]:
    return run_ranks(_train, 1, ParallelLayout(), _spec(moe=moe, tied=tied), {}, False)[0]


FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

LAYOUTS = {
    "tp2": (ParallelLayout(tp=2), {}, {}),
    "tp2-sp": (ParallelLayout(tp=2), {}, {"sequence_parallel": True}),
    "pp2": (ParallelLayout(pp=2), {}, {}),
    "pp2-tied": (ParallelLayout(pp=2), {"tied": True}, {}),
    "pp2-uneven": (ParallelLayout(pp=2, stage_layers=(1, 3)), {}, {}),
    "pp2-vpp2-uneven-tied": (ParallelLayout(pp=2, vpp=2, stage_layers=(0, 1, 2, 1)), {"tied": True}, {}),
    "tp2-pp2-vpp2": (ParallelLayout(tp=2, pp=2, vpp=2), {}, {}),
    "dp2": (ParallelLayout(dp=2), {}, {}),
    "dp2-sharded-optimizer": (ParallelLayout(dp=2), {}, {"distributed_optimizer": True}),
    "cp2": (ParallelLayout(cp=2), {}, {}),
    "tp2-cp2-other-order": (ParallelLayout(tp=2, cp=2, order="cp-tp-ep-dp-pp"), {}, {"sequence_parallel": True}),
    "moe-etp2": (ParallelLayout(tp=2), {"moe": True}, {}),
    "moe-ep2": (ParallelLayout(dp=2, ep=2), {"moe": True}, {}),
    "moe-tp2-ep2-etp1": (ParallelLayout(tp=2, ep=2, etp=1), {"moe": True}, {}),
    "moe-tp2-ep2-etp1-sequential": (ParallelLayout(tp=2, ep=2, etp=1), {"moe": True}, {"grouped_experts": False}),
    "moe-etp2-ep2": (ParallelLayout(dp=4, ep=2, etp=2), {"moe": True}, {}),
    "tp2-sp-recompute": (ParallelLayout(tp=2), {}, {"sequence_parallel": True, "overrides": FULL_RECOMPUTE}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_training_equals_one_rank(case: str) -> None:
    layout, kind, options = LAYOUTS[case]
    options = dict(options)
    distributed_optimizer = options.pop("distributed_optimizer", False)
    kind = {"moe": False, "tied": False, **kind}
    expected, expected_shapes = _one_rank(kind["moe"], kind["tied"])
    results = run_ranks(_train, layout.world_size, layout, _spec(**kind), options, distributed_optimizer)
    shapes: dict[str, tuple[int, ...]] = {}
    for losses, part in results:
        assert_near(losses, expected, forward(LAYERS, FFN), what="losses")
        shapes |= part
    assert shapes == expected_shapes
    assert expected[0] - expected[-1] > 0.05, "the model does not learn, so equal losses would prove nothing"


def _random_numbers(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    initialize_parallel(ParallelLayout(tp=2), seed=7)
    with megatron_runtime():
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        before = torch.rand(5, device="cuda")
        with get_cuda_rng_tracker().fork():
            own = torch.rand(5, device="cuda")
        return before, own, torch.rand(5, device="cuda")


def test_random_states_follow_tensor_parallelism() -> None:
    """Outside of tensor-parallel regions all ranks draw the same numbers, inside each draws its own."""
    (before, own, after), (other_before, other_own, other_after) = run_ranks(_random_numbers, 2)
    assert torch.equal(before, other_before)
    assert torch.equal(after, other_after)
    assert not torch.equal(own, other_own)
    assert not torch.equal(before, after)


def test_recomputation_replays_dropout() -> None:
    """Megatron swaps random states around a recomputed layer: bit-equal losses show that the CPU's stand in for CUDA's."""
    dropout = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
    plain, recomputed = (
        run_ranks(_train, 2, ParallelLayout(tp=2), _spec(), {"overrides": dropout | more}, False)
        for more in ({}, FULL_RECOMPUTE)
    )
    assert [losses for losses, _ in plain] == [losses for losses, _ in recomputed]
    without, _ = _one_rank(False, False)
    assert abs(plain[0][0][0] - without[0]) > 1e-4, "dropout must do something"


def test_training_in_bf16() -> None:
    """`Float16Module` and the fp32 master weights run."""
    expected, _ = _one_rank(False, False)
    for losses, _ in run_ranks(_train, 2, ParallelLayout(tp=2), _spec(), {"dtype": torch.bfloat16}, True):
        assert_near(losses, expected, forward(LAYERS, 1, torch.bfloat16))  # stages round to bf16, sums are kept in fp32


def _forward(rank: int, layout: ParallelLayout, spec: ModelSpec, tokens: Tensor) -> Tensor | None:
    initialize_parallel(layout)
    with megatron_runtime():
        model = build_model(spec, layout, ddp=layout.dp > 1)
        _initialize(model)
    rows = tokens.chunk(layout.dp)[layout.coordinates(rank).dp]
    model[0].train()
    logits = forward_logits(model, rows)
    assert model[0].training, "forward_logits must leave the mode as it was"
    return logits


FORWARD_LAYOUTS = [
    (ParallelLayout(tp=2), False),
    (ParallelLayout(tp=2, vocab_multiple=8), False),
    (ParallelLayout(tp=2, cp=2), False),
    (ParallelLayout(pp=2, vpp=2), False),
    (ParallelLayout(tp=2, pp=2, ep=2, etp=1, stage_layers=(3, 1)), True),
    (ParallelLayout(dp=2, ep=2), True),
]


@pytest.mark.parametrize(("layout", "moe"), FORWARD_LAYOUTS, ids=[str(layout) for layout, _ in FORWARD_LAYOUTS])
def test_forward_logits_equal_one_rank(layout: ParallelLayout, moe: bool) -> None:
    """Batch, sequence and vocabulary of sizes that no layout divides."""
    # An expert sees its own tokens only: routing is per token, so data parallel ranks may have different rows.
    tokens = torch.randint(0, 61, (6 if layout.dp > 1 else 3, 11), generator=torch.Generator().manual_seed(2))
    spec = _spec(moe=moe, vocab=61)
    (expected,) = run_ranks(_forward_whole_vocabulary, 1, spec, tokens)
    results = run_ranks(_forward, layout.world_size, layout, spec, tokens)
    for rank, logits in enumerate(results):
        place = layout.coordinates(rank)
        if place.pp < layout.pp - 1:
            assert logits is None
            continue
        assert logits.shape == (len(tokens) // layout.dp, 11, 61)
        assert_near(logits, expected.chunk(layout.dp)[place.dp], forward(LAYERS, FFN), what="logits")


def _forward_whole_vocabulary(rank: int, spec: ModelSpec, tokens: Tensor) -> Tensor | None:
    return _forward(rank, ParallelLayout(), spec, tokens)


def _refusals(rank: int) -> dict[str, str]:
    """The error message of each impossible request, by its name."""
    messages: dict[str, str] = {}

    def refuse(name: str, error: type[Exception], request: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            request()
        messages[name] = str(caught.value)

    spec, layout = _spec(), ParallelLayout(tp=2)
    refuse("no parallel state", LayoutError, current_layout)
    refuse("model before parallel state", LayoutError, lambda: build_model(spec, layout))
    refuse("too few ranks", LayoutError, lambda: initialize_parallel(ParallelLayout(tp=4)))
    refuse("still none", LayoutError, current_layout)
    initialize_parallel(layout)
    refuse("twice", LayoutError, lambda: initialize_parallel(layout))
    refuse("another layout", LayoutError, lambda: build_model(spec, ParallelLayout(dp=2)))
    refuse("layers", LayoutError, lambda: current_layout(spec_num_layers=3, stage_layers=(2,)))
    refuse("misspelt", ValueError, lambda: build_model(spec, layout, overrides={"recompute_granularty": "full"}))
    refuse("contradiction", ValueError, lambda: build_model(spec, layout, overrides={"sequence_parallel": True}))
    wrong_rope = dataclasses.replace(spec, extras=(RotaryFrequencies((1.0, 0.5)),))
    refuse("rope", ValueError, lambda: build_model(wrong_rope, layout))
    return messages


def test_impossible_requests_say_what_is_wrong() -> None:
    for messages in run_ranks(_refusals, 2):
        assert "call initialize_parallel" in messages["no parallel state"]
        assert "call initialize_parallel" in messages["model before parallel state"]
        assert "needs 4 ranks, found a world of 2" in messages["too few ranks"]
        assert "call initialize_parallel" in messages["still none"]
        assert "call destroy_parallel() first" in messages["twice"]
        assert "tp=2" in messages["another layout"]
        assert "dp=2" in messages["another layout"]
        assert "must sum up to the model's 3 layers" in messages["layers"]
        assert "did you mean 'recompute_granularity'" in messages["misspelt"]
        assert "build_model's sequence_parallel" in messages["contradiction"]
        assert "2 rotary frequencies are given, the Megatron model has 6" in messages["rope"]


def _rope(rank: int, inv_freq: tuple[float, ...] | None) -> Tensor | None:
    initialize_parallel(ParallelLayout())
    with megatron_runtime():
        extras = () if inv_freq is None else (RotaryFrequencies(inv_freq),)
        model = build_model(dataclasses.replace(_spec(), extras=extras))
        _initialize(model)
    return forward_logits(model, torch.arange(9)[None])


def test_rope_frequencies_are_replaced() -> None:
    default = tuple(10000.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2))
    (built_in,), (same,), (slower,) = (run_ranks(_rope, 1, f) for f in (None, default, tuple(f / 8 for f in default)))
    # The frequencies are rounded once, positions multiply them.
    assert_near(same, built_in, rounding(len(default), 9), what="logits")
    assert (slower - built_in).abs().max() > 1e-3
