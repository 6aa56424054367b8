"""Round trips on virtual ranks: every family, every combination of TP, PP, VPP, EP and ETP in {1, 2, 4} that it admits."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import VARIANTS, assert_same_state, hf_state, tiny_checkpoint

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.digest import add, digest, digest_strided
from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)[0]


def admitted(bridge: AutoBridge) -> Iterator[ParallelLayout]:
    """All combinations; dp is what makes the expert axes fit. Uneven splits where layers don't divide."""
    for tp, pp, vpp, ep, etp in itertools.product((1, 2, 4), repeat=5):
        if (vpp > 1 and pp == 1) or (not bridge.spec.num_experts and (ep, etp) != (1, 1)):
            continue
        stages = pp * vpp
        uneven = None if 4 % stages == 0 else (1, 0) * (stages // 2 - 4) + (1,) * (stages - 2 * max(0, stages // 2 - 4))
        stage_layers = uneven if uneven is None or sum(uneven) == 4 else (1,) * 4 + (0,) * (stages - 4)
        yield ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=max(1, ep * etp // tp), stage_layers=stage_layers)


def test_round_trips_are_bit_exact(checkpoint: Path) -> None:
    bridge, expected = AutoBridge.from_pretrained(checkpoint), hf_state(checkpoint)
    announced = {tensor.hf_name: (tensor.dtype, tensor.shape) for tensor in bridge.metadata(torch.float32)}
    assert announced == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()}
    layouts = list(admitted(bridge))
    assert len(layouts) >= 20
    for layout in layouts:
        shards = bridge.shard(expected, layout)
        assert_same_state(bridge.unshard(shards, layout), expected)


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tp=2, pp=2, stage_layers=(1, 3)),
        ParallelLayout(tp=4, pp=2, vpp=2, stage_layers=(1, 1, 0, 2)),
        ParallelLayout(tp=2, cp=2, dp=2, order="tp-cp-ep-pp-dp"),
        ParallelLayout(tp=4, vocab_multiple=128),
        ParallelLayout(cp=3, dp=2, pp=3, stage_layers=(2, 1, 1)),
    ],
    ids=str,
)
def test_uneven_splits_orders_and_padding(checkpoint: Path, layout: ParallelLayout) -> None:
    bridge, expected = AutoBridge.from_pretrained(checkpoint), hf_state(checkpoint)
    assert_same_state(bridge.unshard(bridge.shard(expected, layout), layout), expected)


def test_padding_is_zero_and_stays_behind(checkpoint: Path) -> None:
    bridge, expected = AutoBridge.from_pretrained(checkpoint), hf_state(checkpoint)
    layout = ParallelLayout(tp=4)
    shards = bridge.shard(expected, layout)
    embedding = torch.cat([shards[rank]["embedding.word_embeddings.weight"] for rank in range(4)])
    assert embedding.shape == (516, 64)
    assert torch.equal(embedding[:515], expected["model.embed_tokens.weight"])
    assert not embedding[515:].any()


def test_replicas_share_the_work(checkpoint: Path) -> None:
    bridge = AutoBridge.from_pretrained(checkpoint)
    plan = bridge.export_plan(ParallelLayout(tp=2, dp=3))
    load = [sum(copy.numel for copy in plan.from_rank(rank)) for rank in range(6)]
    assert max(load) <= 1.1 * sum(load) / 6
    written = {name: 0 for name in plan.hf_shapes}
    for copy in plan.copies:
        written[copy.hf_name] += copy.numel
    assert written == {name: torch.Size(shape).numel() for name, shape in plan.hf_shapes.items()}


def test_digests_of_shards_add_up(checkpoint: Path) -> None:
    bridge, expected = AutoBridge.from_pretrained(checkpoint), hf_state(checkpoint)
    layout = ParallelLayout(tp=2, pp=2, dp=2)
    shards, plan = bridge.shard(expected, layout), bridge.export_plan(layout)
    for hf_name, copies in plan.by_hf_name.items():
        parts = [
            digest_strided(
                copy.source.of(shards[copy.source_rank][copy.source.name], copy.shape),
                columns=expected[hf_name].shape[-1],
                offset=copy.hf.offset,
                strides=copy.hf.strides,
            )
            for copy in copies
        ]
        assert add(*parts) == digest(expected[hf_name])


def test_fused_layout_is_megatrons(tmp_path: Path) -> None:
    """Spot check against hand-written slices: QKV by group, gate and up per rank, experts by EP then ETP."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe")
    bridge, state = AutoBridge.from_pretrained(directory), hf_state(directory)
    shards = bridge.shard(state, ParallelLayout(tp=2, ep=2, etp=2, dp=2))
    attention = "model.layers.2.self_attn"
    q, k, v = (state[f"{attention}.{name}_proj.weight"].view(4, -1, 64) for name in "qkv")
    fused = torch.cat([q, k, v], dim=1)[2:].reshape(-1, 64)
    assert torch.equal(shards[1]["decoder.layers.2.self_attention.linear_qkv.weight"], fused)
    gate, up = (state[f"model.layers.1.mlp.{name}_proj.weight"][68:] for name in ("gate", "up"))
    assert torch.equal(shards[1]["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate, up]))
    rank = 3  # etp rank 1 of ep rank 1, which holds experts 4 to 7
    gate, up = (state[f"model.layers.0.mlp.experts.5.{name}_proj.weight"][16:] for name in ("gate", "up"))
    assert torch.equal(shards[rank]["decoder.layers.0.mlp.experts.linear_fc1.weight5"], torch.cat([gate, up]))
    down = state["model.layers.0.mlp.experts.5.down_proj.weight"][:, 16:]
    assert torch.equal(shards[rank]["decoder.layers.0.mlp.experts.linear_fc2.weight5"], down)
    assert "decoder.layers.0.mlp.experts.linear_fc1.weight3" not in shards[rank]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(tp=16), "8 attention heads do not divide by tp=16"),
        (ParallelLayout(tp=6), "do not divide by tp=6"),
        (ParallelLayout(tp=3), r"do not divide by tp=3"),
        (ParallelLayout(pp=3), "4 layers do not divide over pp\\*vpp = 3\\*1"),
        (ParallelLayout(ep=3, dp=3), "8 experts do not divide by ep=3"),
        (ParallelLayout(etp=64, dp=64), "do not divide by etp=64"),
    ],
)
def test_layouts_that_the_model_does_not_admit(tmp_path: Path, layout: ParallelLayout, message: str) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe")
    with pytest.raises(LayoutError, match=message):
        AutoBridge.from_pretrained(directory).shard(hf_state(directory), layout)


def test_experts_axis_needs_experts(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(LayoutError, match="ep=2: LlamaForCausalLM has no experts"):
        AutoBridge.from_pretrained(directory).shard(hf_state(directory), ParallelLayout(ep=2, dp=2))
