"""ParallelLayout is Megatron's own rank arithmetic, and refuses what Megatron would."""

import itertools

import pytest

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout, padded_vocab_size
from mbridge_rl.megatron.cpu.runtime import megatron_runtime


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "tp-ep-dp-cp-pp", "cp-tp-dp-ep-pp"])
def test_coordinates_equal_megatrons_rank_generator(order: str) -> None:
    with megatron_runtime():
        from megatron.core.parallel_state import RankGenerator

    for tp, cp, dp, pp in itertools.product((1, 2, 3), (1, 2), (1, 2), (1, 2)):
        layout = ParallelLayout(tp=tp, cp=cp, dp=dp, pp=pp, order=order)
        if pp > 1 and cp > 1 and not order.endswith("pp"):
            continue  # Megatron refuses it: dense and expert layers would stand on different stages
        generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
        for axis in ("tp", "cp", "dp", "pp"):
            for group in generator.get_ranks(axis):
                assert [getattr(layout.coordinates(rank), axis) for rank in group] == list(range(len(group)))


def test_expert_coordinates_equal_megatrons_rank_generator() -> None:
    with megatron_runtime():
        from megatron.core.parallel_state import RankGenerator

    layout = ParallelLayout(tp=4, dp=6, pp=2, ep=3, etp=2)
    generator = RankGenerator(tp=2, ep=3, dp=layout.expert_dp, pp=2, cp=1, order=layout.order)
    for axis, attribute in {"tp": "etp", "ep": "ep", "dp": "expert_dp", "pp": "pp"}.items():
        for group in generator.get_ranks(axis):
            assert [getattr(layout.coordinates(rank), attribute) for rank in group] == list(range(len(group)))


def test_uneven_and_interleaved_stages() -> None:
    layout = ParallelLayout(pp=2, vpp=2, stage_layers=(1, 3, 2, 1))
    assert [layout.layers_of(7, pp_rank, chunk) for pp_rank, chunk in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        range(0, 1),
        range(1, 4),
        range(4, 6),
        range(6, 7),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp": 0}, "tp must be at least 1"),
        ({"vpp": 2}, "vpp=2 needs pp"),
        ({"tp": 2, "ep": 4, "etp": 1}, r"ep\*etp = 4\*1 must divide tp\*cp\*dp = 2\*1\*1"),
        ({"pp": 2, "stage_layers": (1, 2, 3)}, "needs pp\\*vpp = 2 numbers, found 3"),
        ({"order": "tp-pp"}, "order must name each of"),
    ],
)
def test_impossible_layouts_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ParallelLayout(**arguments)


def test_layers_that_do_not_divide_ask_for_a_split() -> None:
    with pytest.raises(LayoutError, match=r"7 layers do not divide over pp\*vpp = 2\*1.*stage_layers"):
        ParallelLayout(pp=2).stage_of_layer(7)
    with pytest.raises(LayoutError, match="must sum up to the model's 7 layers, found 6"):
        ParallelLayout(pp=2, stage_layers=(3, 3)).stage_of_layer(7)


def test_padding() -> None:
    assert padded_vocab_size(515, 4) == 516
    assert padded_vocab_size(515, 2, 128) == 768
    assert padded_vocab_size(512, 4) == 512


def test_orders_that_tear_stages_apart_are_refused() -> None:
    layout = ParallelLayout(tp=2, cp=2, pp=2, order="tp-cp-ep-pp-dp")
    with pytest.raises(LayoutError, match="puts rank 2 on pipeline stage 0 for dense layers and 1 for"):
        layout.coordinates(2)
