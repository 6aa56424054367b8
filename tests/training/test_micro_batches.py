"""How batches are cut: every token that counts is computed by one context-parallel rank of one data-parallel rank, once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbridge_rl.core.layout import ParallelLayout as Layout
from mbridge_rl.training.batch import Batch, Sequences
from mbridge_rl.training.trainer.micro_batches import Split, pack_rows, split_rows


def _batch(lengths: list[int]) -> Batch:
    prompts = [[100 + row] for row in range(len(lengths))]
    completions = [list(range(1, length + 1)) for length in lengths]
    batch = Batch.from_completions(prompts, completions, pad_token_id=0, length=max(lengths, default=0) + 3)
    return batch.with_tensors(advantages=batch.spread(torch.arange(1.0, len(lengths) + 1)))


def _splits(batch: Batch, layout: Layout, packing: bool, size: int) -> list[Split]:
    cut = pack_rows if packing else split_rows
    return [cut(batch, layout, rank, size) for rank in range(layout.world_size)]


LAYOUTS = [Layout(), Layout(dp=2), Layout(cp=2), Layout(tp=2, cp=2, dp=2), Layout(pp=2, vpp=2), Layout(dp=3, cp=3)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=11),
    layout=st.sampled_from(LAYOUTS),
    packing=st.booleans(),
    size=st.integers(1, 5),
)
def test_every_token_is_computed_once_and_written_back(lengths: list[int], layout: Layout, packing: bool, size: int) -> None:
    batch = _batch(lengths)
    splits = _splits(batch, layout, packing, 18 * size if packing else size)
    shapes = {(split.rows, split.length, len(split.micro_batches)) for split in splits}
    assert len(shapes) == 1  # pipelines and experts need the same everywhere
    (rows, length, count) = shapes.pop()
    assert count % (layout.pp if layout.vpp > 1 else 1) == 0
    assert length % (layout.tp * layout.cp) == 0
    written = torch.zeros(2, *batch.tokens.shape, dtype=torch.int64)
    for rank, split in enumerate(splits):
        if layout.coordinates(rank).tp or layout.coordinates(rank).pp:
            continue
        for micro_batch in split.micro_batches:
            micro = micro_batch.of(batch, None)
            assert micro.tokens.shape == (rows, length // layout.cp)
            results = torch.zeros_like(written)
            micro_batch.write(results, torch.stack([micro.mask.long(), micro.need("targets")]))
            written += results
            of_row = micro.need("advantages")[micro.mask].long() - 1
            assert torch.equal(
                batch.need("targets").flatten()[micro_batch.source[micro.mask]], micro.need("targets")[micro.mask]
            )
            assert torch.equal(micro_batch.source[micro.mask] // batch.tokens.shape[1], of_row)
    assert torch.equal(written[0], batch.mask.long())
    assert torch.equal(written[1][batch.mask], batch.need("targets")[batch.mask])


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), dp=st.integers(1, 4), budget=st.integers(31, 90))
def test_packed_micro_batches_keep_to_the_budget_and_are_balanced(lengths: list[int], dp: int, budget: int) -> None:
    batch = _batch(lengths)
    splits = _splits(batch, Layout(dp=dp), True, budget)
    loads = splits[0].loads
    assert all(split.loads == loads for split in splits)
    assert sum(map(sum, loads)) == sum(lengths)  # a prompt of one token, and the last token is not read
    assert max(max(of_rank) for of_rank in loads) <= budget
    # Longest first to the emptiest: no two bins differ by more than one sequence.
    assert max(map(max, loads)) - min(map(min, loads)) <= max(lengths)
    assert sum(len(of_rank) for of_rank in loads) <= max(dp, 2 * (-(-sum(lengths) // budget) + dp))


def test_packed_sequences_start_anew_and_end_with_their_last_prediction() -> None:
    batch = _batch([3, 1, 2])
    (micro_batch,) = pack_rows(batch, Layout(), 0, 20).micro_batches
    assert micro_batch.offsets == (0, 3, 4, 6)
    micro = micro_batch.of(batch, None)
    assert micro.tokens.tolist() == [[100, 1, 2, 101, 102, 1]]
    assert micro.need("targets").tolist() == [[1, 2, 3, 1, 1, 2]]
    assert micro.need("position_ids").tolist() == [[0, 1, 2, 0, 0, 1]]
    assert micro.need("advantages").tolist() == [[1, 1, 1, 2, 3, 3]]
    assert micro.sequence_sum(torch.ones(1, 6)).tolist() == [[3, 3, 3, 1, 2, 2]]


def test_rows_without_tokens_that_count_are_not_packed() -> None:
    batch = _batch([3, 1, 2]).without_rows(torch.tensor([False, True, False]))
    (micro_batch,) = pack_rows(batch, Layout(), 0, 20).micro_batches
    assert micro_batch.offsets == (0, 3, 5)
    assert batch.num_tokens == 5


def test_over_long_sequences_are_refused_by_row() -> None:
    with pytest.raises(ValueError, match="row 1 has 9 tokens, a micro-batch holds 8"):
        pack_rows(_batch([3, 9]), Layout(), 0, 8)
    with pytest.raises(ValueError, match="row 1 has 12 tokens, a micro-batch holds 9"):  # cp=2 cuts in four
        pack_rows(_batch([3, 9]), Layout(cp=2), 0, 9)


def test_sums_over_sequences_see_every_part() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    batch = Batch(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[True, True, True, False]]))
    assert batch.sequence_sum(values).tolist() == [[7.0] * 4]
    parted = batch.take(torch.tensor([[0, 2, -1, 1]]), Sequences(torch.tensor([[0, 1, 1, 0]]), 2))
    assert parted.sequence_sum(values).tolist() == [[9.0, 2.0, 2.0, 9.0]]


def test_batches_move_with_their_sequences() -> None:
    batch = _batch([2]).take(torch.tensor([[0, 1]]), Sequences(torch.zeros(1, 2, dtype=torch.int64), 1)).to("cpu")
    assert batch.sequences is not None
    assert batch.sequences.count == 1


def test_rows_can_be_chosen_by_mask_or_index() -> None:
    batch = _batch([3, 1, 2])
    chosen = batch.rows(torch.tensor([True, False, True]))
    assert chosen.tokens[:, 0].tolist() == [100, 102]
    assert torch.equal(chosen.tokens, batch.rows(torch.tensor([0, 2])).tokens)
    assert chosen.tensors().keys() == batch.tensors().keys()
