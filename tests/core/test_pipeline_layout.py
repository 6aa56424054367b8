"""How layers are dealt to pipeline stages: our arithmetic is Megatron's own, over every way to say it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import DENSE, assert_same_state, hf_state, tiny_checkpoint, tiny_config
from tolerance import assert_near, forward

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.pipeline import counted_stages
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.parameters import layout_of

with megatron_runtime():
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

pieces = st.recursive(
    st.sampled_from(["t", "tt", "|", "t|", ",", "t*3", "|*2"]),
    lambda inner: st.builds("({}{})*{}".format, inner, inner, st.integers(1, 4)),
    max_leaves=4,
)


@st.composite
def layout_strings(draw: st.DrawFn) -> str:
    """Strings of the grammar, and some that are not."""
    body = "".join(draw(st.lists(pieces, max_size=5)))
    head, tail = draw(st.sampled_from(["E", "E", "E", "Et", ""])), draw(st.sampled_from(["L", "L", "mL", "m|L", "|L", ""]))
    noise = draw(st.sampled_from(["", "", "", "", "*", ")", "(", "*2", "x", "()*2", "*2*3", "(tt)"]))
    place = draw(st.integers(0, len(body)))
    return f"{head}{body[:place]}{noise}{body[place:]}{tail}"


def megatrons_counts(layout: str | list[Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Decoder and prediction layers of each stage as Megatron parses them, `None` where it refuses."""
    try:
        pp = len(PipelineParallelLayerLayout.parse_str_to_list(layout) if isinstance(layout, str) else layout)
        parsed = PipelineParallelLayerLayout(layout, pp)
        decoder, mtp = (tuple(stage[0].count(kind) for stage in parsed.layout) for kind in (LayerType.decoder, LayerType.mtp))
        parsed.validate_layer_layout(sum(decoder), sum(mtp) or None)
    except (AssertionError, IndexError):
        return None
    return decoder, mtp


def ours(layout: str | list[Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    try:
        return counted_stages(layout)
    except LayoutError:
        return None


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(layout_strings())
@example("Et*3|(tt|)*29,m|L")
@example("E|(tt|)*2,(t|)*4,mL")
@example("Ettt|(tt|)*29,m|L")
@example("E(t|)*2*3L")
@example("Et*(2)*2L")
def test_strings_mean_what_megatron_parses(text: str) -> None:
    expected = megatrons_counts(text)
    nested = any(text[:end].count("(") - text[:end].count(")") > 1 for end in range(len(text)))
    if expected is not None or not nested:  # Megatron has no nested groups
        assert ours(text) == expected


def test_groups_may_nest() -> None:
    assert ours("E|((t|)*2tt|)*3L") == megatrons_counts("E|(t|t|tt|)*3L") == ((0, 1, 1, 2, 1, 1, 2, 1, 1, 2, 0), (0,) * 11)


def test_lists_mean_what_megatron_takes() -> None:
    lists: list[list[list[Any]]] = [
        [["embedding", "decoder"], ["decoder", "decoder", "decoder", "loss"]],
        [["embedding"], [" Decoder "] * 2, [], ["decoder"], ["mtp", "LOSS"]],
        [[LayerType.embedding, LayerType.decoder], [LayerType.decoder, "mtp"], [LayerType.loss]],
    ]
    for stages in lists:
        assert ours(stages) == megatrons_counts(stages) is not None
    assert ours([["embedding", "decoder", "head"], ["loss"]]) is None
    assert ours([["E"], ["decoder", "loss"]]) is None  # letters are for strings


def cases() -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    """`(layers, pp, vpp, how they are dealt)`."""
    some = (None, 1, 2, 3, 4, 6)
    for layers, pp, vpp in itertools.product((1, 2, 4, 5, 6, 7, 8, 10, 12, 14, 22), (1, 2, 3, 4, 5), (1, 2, 3)):
        if vpp > 1 and pp == 1:
            continue
        for first, last in itertools.product(some, some):
            if pp > 1 or first is None or last is None:
                yield layers, pp, vpp, {"first_stage_layers": first, "last_stage_layers": last}
        for embedding, loss in ((True, False), (False, True), (True, True)):
            yield layers, pp, vpp, {"embedding_as_layer": embedding, "loss_as_layer": loss}


MEGATRONS_NAMES = {
    "first_stage_layers": "num_layers_in_first_pipeline_stage",
    "last_stage_layers": "num_layers_in_last_pipeline_stage",
    "embedding_as_layer": "account_for_embedding_in_pipeline_split",
    "loss_as_layer": "account_for_loss_in_pipeline_split",
}


def megatrons_split(layers: int, pp: int, vpp: int, dealt: dict[str, Any]) -> list[range] | None:
    """The layers of each virtual stage by Megatron's own functions, or `None` if Megatron refuses the split."""
    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=2,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            pipeline_dtype=float,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
            cuda_graph_scope=[],
            **{MEGATRONS_NAMES[name]: value for name, value in dealt.items()},
        )
        stages = []
        for chunk, rank in itertools.product(range(vpp), range(pp)):
            vp_stage = chunk if vpp > 1 else None
            count = get_num_layers_to_build(config, vp_stage, rank)
            offset = get_transformer_layer_offset(config, vp_stage, rank)
            stages.append(range(offset, offset + count))
    except (AssertionError, ValueError):
        return None
    except ZeroDivisionError:  # a bug of Megatron: with virtual stages, if there are a first and a last stage only
        return [range(-1)]
    return None if any(stage.stop < stage.start for stage in stages) else stages  # it lets a middle rank have -1 layers


def test_splits_are_megatrons() -> None:
    accepted = 0
    for layers, pp, vpp, dealt in cases():
        layout = ParallelLayout(pp=pp, vpp=vpp, **dealt)
        expected = megatrons_split(layers, pp, vpp, dealt)
        try:
            stages = [layout.layers_of(layers, rank, chunk) for chunk, rank in itertools.product(range(vpp), range(pp))]
        except LayoutError:
            stages = None
        if expected == [range(-1)]:
            continue
        assert stages == expected, (layers, layout)
        accepted += stages is not None
    assert accepted > 700


def test_layout_strings_become_stages() -> None:
    layout = ParallelLayout(pp=2, pipeline_layout="Et|tt|t,m|L")
    as_stages = {"stage_layers": (1, 2, 1, 0), "stage_mtp_layers": (0, 0, 1, 0)}
    assert layout == ParallelLayout(pp=2, vpp=2, **as_stages)
    assert layout.mtp_stage == 2
    assert ParallelLayout(pp=3).mtp_stage == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pp": 2, "pipeline_layout": "Et|t|tL"}, "has 3 stages, which are not"),
        ({"pp": 2, "vpp": 2, "pipeline_layout": "Ett|tL"}, "has 2 stages, which are not"),
        ({"pp": 2, "pipeline_layout": "tt|tL"}, "must begin with the embedding"),
        ({"pp": 2, "pipeline_layout": "Et|t"}, "end with the loss"),
        ({"pp": 2, "pipeline_layout": "Etm|tL"}, "decoder layers .t. after a prediction layer"),
        ({"pp": 2, "pipeline_layout": "Et|xL"}, "does not parse at 'x'"),
        ({"pp": 2, "pipeline_layout": "Et|tL", "stage_layers": (1, 1)}, "leave out stage_layers"),
        ({"pp": 2, "pipeline_layout": "Ett|tm|m|L"}, "must all be in one stage"),
        ({"pp": 2, "pipeline_layout": "Ett|tm||L"}, "the last of its pipeline rank"),
        ({"pp": 2, "first_stage_layers": 0}, "first_stage_layers must be at least 1"),
        ({"pp": 2, "first_stage_layers": 1, "loss_as_layer": True}, "say in one way"),
        ({"first_stage_layers": 1, "last_stage_layers": 1}, "one and the same pipeline rank"),
    ],
)
def test_impossible_pipelines_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParallelLayout(**arguments)


LIVE = {
    "string-vpp-empty-last-stage": ParallelLayout(pp=2, pipeline_layout="Ett|t|t|L"),
    "string-empty-stages": ParallelLayout(tp=2, pp=2, pipeline_layout="E|ttt||tL"),
    "first": ParallelLayout(pp=3, first_stage_layers=2),
    "as-layers": ParallelLayout(pp=3, embedding_as_layer=True, loss_as_layer=True),
}


def _there_and_back(rank: int, layout: ParallelLayout, directory: str, saved: str) -> Any:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, dtype=torch.float32)
    bridge.load_weights(model)
    held = [layer.layer_number - 1 for chunk in model for layer in chunk.decoder.layers]
    bridge.save_pretrained(model, saved)
    return held, forward_logits(model, torch.arange(20).view(2, 10))


@pytest.mark.parametrize("case", LIVE)
def test_live_models_of_every_split(case: str, tmp_path: Any) -> None:
    layout = LIVE[case]
    directory, reference = tiny_checkpoint(tmp_path / "hf", "qwen3-tied")
    results = run_ranks(_there_and_back, layout.world_size, layout, directory, tmp_path / "saved")
    assert_same_state(hf_state(tmp_path / "saved"), hf_state(directory))
    with torch.no_grad():
        expected = reference(torch.arange(20).view(2, 10)).logits
    for rank, (held, logits) in enumerate(results):
        stage = layout.coordinates(rank).pp
        assert held == [layer for chunk in range(layout.vpp) for layer in layout.layers_of(4, stage, chunk)]
        if stage == layout.pp - 1:
            assert_near(logits, expected, forward(DENSE["num_hidden_layers"], DENSE["intermediate_size"]), what="logits")
        else:
            assert logits is None


def _built_elsewhere(rank: int, text: str) -> ParallelLayout:
    """A model that somebody else gave a layout string."""
    with megatron_runtime():
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=4,
            hidden_size=64,
            num_attention_heads=8,
            pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout=text,
            pipeline_dtype=float,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
            cuda_graph_scope=[],
        )
        model = [
            GPTModel(config, get_gpt_decoder_block_spec(config, True, vp_stage=chunk), 516, 128, vp_stage=chunk)
            for chunk in range(2)
        ]
    return layout_of(model, AutoBridge.from_config(tiny_config("llama")).spec)


def test_the_split_of_models_built_elsewhere() -> None:
    for layout in run_ranks(_built_elsewhere, 2, "Ett|t|t|L"):
        assert (layout.pp, layout.vpp, layout.stage_layers) == (2, 2, (2, 1, 1, 0))
