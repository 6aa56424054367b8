"""Multi-token-prediction layers: carried through every conversion, skipped where RL has no use for them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_scenarios as scenarios
import pytest
import torch
from families import FAMILIES
from families.family import Family
from family_scenarios import TOKENS, assert_close_logits
from interpreter import Interpreter
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state
from tolerance import assert_near, assert_trained_near, backward
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import LayoutError, StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parallel import initialize_parallel

VARIANTS = ("deepseek-v3", "glm-4.5", "glm-4.7-flash")
LAYERS = 3  # of the families' tiny models; the prediction layer is one more
WIDTH = 256  # the widest of theirs


def family_of(variant: str, layers: int) -> Family:
    family = FAMILIES[variant]
    changes: dict[str, Any] = {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    if "mlp_layer_types" in family.config:
        changes["mlp_layer_types"] = ["dense"] + ["sparse"] * (layers - 1)
    return replace(family, config={**family.config, **changes})


def checkpoint(directory: Path, variant: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Saves a model whose prediction layer is an ordinary layer of Transformers' own class, and what stands before it.

    Returns:
        the model without it, and with it as its last layer (Transformers knows no other way to compute it).
    """
    longer = family_of(variant, LAYERS + 1).checkpoint(directory / "longer", seed)
    state = hf_state(directory / "longer")
    h, prefix = longer.config.hidden_size, f"model.layers.{LAYERS}"
    generator = torch.Generator().manual_seed(seed)
    own = {"enorm": (h,), "hnorm": (h,), "eh_proj": (h, 2 * h), "shared_head.norm": (h,)}
    state |= {f"{prefix}.{name}.weight": torch.randn(shape, generator=generator) * h**-0.25 for name, shape in own.items()}
    state[f"{prefix}.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    state[f"{prefix}.shared_head.head.weight"] = state["lm_head.weight"].clone()
    family_of(variant, LAYERS).hf_config().save_pretrained(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return type(longer).from_pretrained(directory, dtype=torch.float32).eval(), longer.eval()


def layouts() -> list[ParallelLayout]:
    """Prediction layers on the last stage, with decoder layers and without, or before it."""
    pipelines: list[dict[str, Any]] = [
        {},
        {"pp": 2, "stage_layers": (2, 1)},
        {"pp": 3, "pipeline_layout": "Et|tt|mL"},
        {"pp": 3, "pipeline_layout": "Ett|tm|L"},
        {"pp": 2, "pipeline_layout": "Et|t|t|mL"},
    ]
    shards = itertools.product((1, 2), (1, 2), (1, 2))
    return [ParallelLayout(tp=tp, ep=ep, etp=etp, dp=ep * etp, **pipeline) for tp, ep, etp in shards for pipeline in pipelines]


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips(variant: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, variant)
    state, bridge = hf_state(tmp_path), AutoBridge.from_pretrained(tmp_path, mtp=True)
    announced = {tensor.hf_name: tensor.shape for tensor in bridge.metadata(torch.float32)}
    assert announced == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for layout in layouts():
        assert_same_state(bridge.unshard(bridge.shard(state, layout), layout), state)
    copies = {f"model.layers.{LAYERS}.embed_tokens.weight", f"model.layers.{LAYERS}.shared_head.head.weight"}
    without = {name: tensor for name, tensor in state.items() if name not in copies}
    assert_same_state(bridge.unshard(bridge.shard(without, ParallelLayout()), ParallelLayout()), state)
    del without[f"model.layers.{LAYERS}.eh_proj.weight"]
    with pytest.raises(StateMismatchError, match=r"missing model\.layers\.3\.eh_proj\.weight"):
        bridge.shard(without, ParallelLayout())
    plain = AutoBridge.from_pretrained(tmp_path)
    exported = plain.unshard(plain.shard(state, ParallelLayout()), ParallelLayout())
    assert_same_state(exported, {name: state[name] for name in state if f"layers.{LAYERS}." not in name})


def there_and_back(rank: int, directory: Path, layout: ParallelLayout) -> tuple[dict[str, Tensor], Tensor | None]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory, mtp=True)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    exported = dict(bridge.export_weights(model, bucket_bytes=1 << 17))
    bridge.save_pretrained(model, directory / "saved", shard_bytes=1 << 19)
    bridge.import_weights(model, iter(exported.items()))
    return exported, forward_logits(model, TOKENS)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("glm-4.5", ParallelLayout()),
        ("deepseek-v3", ParallelLayout(tp=2, pp=2, ep=2, etp=1, stage_layers=(2, 1))),
        ("glm-4.5", ParallelLayout(pp=3, pipeline_layout="Ett|tm|L")),
        ("glm-4.5", ParallelLayout(pp=2, pipeline_layout="Et|t|t|mL")),
    ],
    ids=["one", "tp2xpp2xep2", "before-the-last", "interleaved"],
)
def test_real_ranks(variant: str, layout: ParallelLayout, tmp_path: Path) -> None:
    """The next-token head computes what it did; everything goes in and out bit for bit."""
    reference, _ = checkpoint(tmp_path, variant)
    ranks = run_ranks(there_and_back, layout.world_size, tmp_path, layout)
    for exported, logits in ranks:
        assert_same_state(exported, hf_state(tmp_path))
        if logits is not None:
            assert_close_logits(logits, reference, FAMILIES[variant].tolerance)
    assert any(logits is not None for _, logits in ranks)
    assert_same_state(hf_state(tmp_path / "saved"), hf_state(tmp_path))


def prediction_logits(rank: int, directory: Path, layout: ParallelLayout) -> Tensor:
    """`[batch, seq, vocab / tp]` of the prediction layer, which Megatron computes where it gets labels."""
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory, mtp=True)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    [core] = unwrap(model)
    seen: list[Tensor] = []
    core.output_layer.register_forward_hook(lambda _, __, output: seen.append(output[0].clone()))  # the loss changes them
    with megatron_runtime(), torch.no_grad():
        core.eval()(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None, labels=TOKENS)
    prediction, _ = seen
    return prediction.transpose(0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_prediction_layer_computes_the_papers_formula(variant: str, tp: int, tmp_path: Path) -> None:
    """The layer computes `T(M [norm(h_i); norm(embedding(t_(i+1)))])` and the shared head (arXiv 2412.19437, 21 to 23), but
    with the embedding first, as the checkpoints and every implementation of them have it."""
    reference, longer = checkpoint(tmp_path, variant)
    parts = run_ranks(prediction_logits, tp, tmp_path, ParallelLayout(tp=tp))
    logits = torch.cat(parts, dim=-1)[:, :-1, : reference.config.vocab_size]
    with torch.no_grad():
        expected = papers_logits(reference, longer, hf_state(tmp_path))
    assert expected.std() > 0.05
    # The last position has no next token.
    assert_near(logits, expected[:, :-1], FAMILIES[variant].tolerance, what="logits")


def papers_logits(reference: nn.Module, longer: nn.Module, state: dict[str, Tensor]) -> Tensor:
    """The longer model from its last layer on, fed with what the prediction layer is fed with."""
    weights = {
        name: state[f"model.layers.{LAYERS}.{name}.weight"] for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    }

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], weights[name], reference.config.rms_norm_eps)

    hidden = reference.model(TOKENS, use_cache=False).last_hidden_state
    embedded = reference.model.embed_tokens(TOKENS.roll(-1, dims=1))
    inputs = torch.cat([norm(embedded, "enorm"), norm(hidden, "hnorm")], dim=-1) @ weights["eh_proj"].T
    longer.model.layers = nn.ModuleList([longer.model.layers[LAYERS]])
    longer.config.num_hidden_layers = longer.model.config.num_hidden_layers = 1
    longer.model.norm.weight.data.copy_(weights["shared_head.norm"])
    return longer(inputs_embeds=inputs, use_cache=False).logits


def trained(rank: int, directory: Path, layout: ParallelLayout, mtp: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two steps of Megatron's optimizer without labels: what is exported then, and this rank's embedding."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory, mtp=mtp)
    model = bridge.build_model(layout, ddp={"overlap_grad_reduce": True, "use_distributed_optimizer": True})
    bridge.load_weights(model)
    with megatron_runtime():
        config = unwrap(model)[0].config
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = model[0].no_sync
        settings = OptimizerConfig(lr=0.01, adam_eps=1e-3, use_distributed_optimizer=True, clip_grad=0.5, weight_decay=0.0)
        optimizer = get_megatron_optimizer(settings, model)
        optimizer.reload_model_params()
        positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)

        def step(data: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
            logits = chunk(TOKENS, positions, None)
            return logits, lambda output: (output.square().mean(), {})

        for _ in range(2):
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter([None] * 2),
                model=model,
                num_microbatches=2,
                seq_length=TOKENS.shape[1],
                micro_batch_size=len(TOKENS),
                forward_only=False,
            )
            optimizer.step()
    embedding = {name: p.detach() for name, p in unwrap(model)[0].named_parameters() if "word_embeddings" in name}
    return dict(bridge.export_weights(model)), embedding


@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(pp=2, stage_layers=(2, 1)), ParallelLayout(pp=3, pipeline_layout="Ett|tm|L")],
    ids=["last", "before-the-last"],
)
def test_training_leaves_prediction_layers_alone_and_copies_equal(layout: ParallelLayout, tmp_path: Path) -> None:
    """With DDP that overlaps and the distributed optimizer: the model learns what it learns without them."""
    checkpoint(tmp_path, "glm-4.5")
    with_layers = run_ranks(trained, layout.world_size, tmp_path, layout, True)
    plain = ParallelLayout(pp=layout.pp, stage_layers=layout.stage_layers)
    without = run_ranks(trained, layout.world_size, tmp_path, plain, False)
    before, (after, _), (expected, _) = hf_state(tmp_path), with_layers[0], without[0]
    prefix = f"model.layers.{LAYERS}."
    for name, tensor in after.items():
        if name.startswith(prefix) and not name.endswith(("embed_tokens.weight", "head.weight")):
            assert torch.equal(tensor, before[name])
        elif not name.startswith(prefix):
            assert_trained_near(tensor, expected[name], before[name], backward(LAYERS, WIDTH), updates=2, what=name)
            # A token may choose no expert of a kind, and the bias is no parameter.
            assert "experts" in name or "e_score" in name or not torch.equal(tensor, before[name])
    assert torch.equal(after[f"{prefix}embed_tokens.weight"], after["model.embed_tokens.weight"])
    held = [tensor for _, embedding in with_layers for tensor in embedding.values()]
    assert len(held) == 2
    assert torch.equal(*held)


@pytest.mark.slow
def test_an_engine_without_prediction_layers_is_refitted(tmp_path: Path) -> None:
    """vLLM serves the next-token head unless it is told to speculate: it has no place for the rest, which is not sent."""
    pytest.importorskip("vllm")
    checkpoint(tmp_path / "A", "glm-4.5", seed=1)
    checkpoint(tmp_path / "B", "glm-4.5", seed=2)
    interpreter = Interpreter()
    try:
        interpreter.call(scenarios.refit_equals_fresh_engine, tmp_path, {}, True)
    finally:
        interpreter.close()


def test_bad_requests_are_named(tmp_path: Path) -> None:
    FAMILIES["mixtral"].checkpoint(tmp_path / "mixtral")
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM has no multi-token-prediction layers"):
        AutoBridge.from_pretrained(tmp_path / "mixtral", mtp=True)
    checkpoint(tmp_path, "glm-4.5")
    bridge = AutoBridge.from_pretrained(tmp_path, mtp=True)
    with pytest.raises(LayoutError, match="would hold the embedding of Glm4MoeForCausalLM twice"):
        bridge.spec.validate(ParallelLayout(pp=2, pipeline_layout="Et|t|tm|L"))
    with pytest.raises(LayoutError, match="places 0 multi-token prediction layers"):
        bridge.spec.validate(ParallelLayout(pp=2, pipeline_layout="Ett|tL"))
