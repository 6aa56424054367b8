"""Where a loader puts things, learned without data: on small models whose loaders do what vLLM's do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mbridge_rl.core.digest import add, digest, digest_strided
from mbridge_rl.core.errors import EngineMismatch
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.landing import ShapedView, times_covered
from mbridge_rl.sync.worker.tracer import Trace, trace_load_weights

CPU = torch.device("cpu")
Loader = Callable[[dict[str, Tensor], str, Tensor], None]


class Model(nn.Module):
    """Parameters by name, and a loader given by the test."""

    def __init__(self, load: Loader, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.load = load
        generator = torch.Generator().manual_seed(5)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            self.load(parameters, name, tensor)


def trace_of(model: Model, **shapes: tuple[int, ...]) -> Trace:
    """The trace, after checking that it changed nothing."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    metadata = [HFTensor(name, torch.float32, shape) for name, shape in shapes.items()]
    trace = trace_load_weights(model, metadata, CPU)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    return trace


def assert_trace_predicts_load(model: Model, trace: Trace, **shapes: tuple[int, ...]) -> None:
    """Really load numbered tensors, and find at every traced target exactly the traced source's numbers."""
    tensors, first = {}, 1.0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + size).view(shape)
        first += size
    model.load_weights((name, tensor.clone()) for name, tensor in tensors.items())
    parameters = dict(model.named_parameters())
    for hf_name, landings in trace.landings.items():
        for landing in landings:
            assert landing.hf_name == hf_name
            expected = landing.source.of(tensors[hf_name])
            assert torch.equal(landing.target.of(parameters[landing.parameter_name].data), expected)
    targets = {
        name: [landing.target for landings in trace.landings.values() for landing in landings if landing.parameter_name == name]
        for name in parameters
    }
    for name, parameter in parameters.items():
        views = targets[name] + trace.filled.get(name, [])
        assert times_covered(views, parameter.shape, parameter.stride()).exactly_once


def fused(parameters: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    first = {"q": 0, "k": 6, "v": 9}[name]
    parameters["qkv"].data.narrow(0, first, tensor.shape[0]).copy_(tensor)


def half_of_rank_1(parameters: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    parameters["up"].data.copy_(tensor.narrow(0, 3, 3))
    parameters["down"].data.copy_(tensor.t().chunk(2, dim=1)[1])


def padded_vocabulary(parameters: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    parameters["embedding"][: tensor.shape[0]].data.copy_(tensor)
    parameters["embedding"][tensor.shape[0] :].data.fill_(0)


def experts(parameters: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    for expert, loaded in enumerate(tensor.unbind()):
        gate, up = loaded.transpose(0, 1).contiguous().chunk(2, dim=0)
        parameters["w13"].data[expert][:5] = gate
        parameters["w13"].data[expert, 5:].copy_(up)


@pytest.mark.parametrize(
    ("loader", "parameters", "tensors"),
    [
        (fused, {"qkv": (12, 5)}, {"v": (3, 5), "q": (6, 5), "k": (3, 5)}),
        (half_of_rank_1, {"up": (3, 7), "down": (7, 3)}, {"both": (6, 7)}),
        (padded_vocabulary, {"embedding": (8, 3)}, {"tokens": (5, 3)}),
        (experts, {"w13": (3, 10, 4)}, {"gate_up": (3, 4, 10)}),
    ],
)
def test_a_trace_predicts_what_a_load_does(
    loader: Loader, parameters: dict[str, tuple[int, ...]], tensors: dict[str, tuple[int, ...]]
) -> None:
    model = Model(loader, **parameters)
    trace = trace_of(model, **tensors)
    assert not trace.untraceable
    assert not trace.rejected
    assert trace.landings.keys() == tensors.keys()
    assert_trace_predicts_load(model, trace, **tensors)


def test_a_lossless_cast_is_traced_through() -> None:
    model = Model(lambda parameters, _, tensor: parameters["x"].data.copy_(tensor.to(torch.float64)), torch.float64, x=(4,))
    trace = trace_of(model, x=(4,))
    assert [landing.source for landing in trace.landings["x"]] == [ShapedView(0, (4,), (1,))]


def mutates(parameters: dict[str, Tensor], _: str, tensor: Tensor) -> None:
    tensor.zero_()
    parameters["x"].data.copy_(tensor)


def by_temporary(parameters: dict[str, Tensor], _: str, tensor: Tensor) -> None:
    temporary = torch.empty(4)
    temporary.copy_(tensor)
    parameters["x"].data.copy_(temporary)


def then_computes(parameters: dict[str, Tensor], _: str, tensor: Tensor) -> None:
    """As vLLM's Mamba loads `A_log`."""
    parameters["x"].data.copy_(tensor)
    parameters["x"].data.copy_(-torch.exp(parameters["x"]))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (then_computes, "computes x from more than the loaded values"),
        (mutates, "in place"),
        (by_temporary, "temporary"),
        (lambda parameters, _, tensor: parameters["x"].data.copy_(tensor + 1), "computes with it"),
        (lambda parameters, _, tensor: parameters["x"].data.copy_(tensor.to(torch.bfloat16)), "casts it"),
        (lambda parameters, _, tensor: parameters["x"].data.add_(tensor), "writes it to x"),
    ],
)
def test_what_is_more_than_a_copy_is_reported(loader: Loader, reason: str) -> None:
    trace = trace_of(Model(loader, x=(4,)), odd=(4,))
    assert reason in trace.untraceable["odd"]
    assert not trace.rejected
    assert "odd" not in trace.landings


def test_refused_tensors_are_named_and_the_others_still_traced() -> None:
    def picky(parameters: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if name == "unknown":
            raise ValueError("there is no module or parameter named 'unknown'")
        assert tensor.shape == (4,)
        parameters[name].data.copy_(tensor)

    trace = trace_of(Model(picky, a=(4,), b=(4,), c=(4,)), a=(4,), unknown=(4,), b=(3,), c=(4,))
    assert trace.rejected.keys() == {"unknown", "b"}
    assert trace.landings.keys() == {"a", "c"}
    assert trace.complete


def test_a_loader_that_replaces_parameters_is_refused_and_undone() -> None:
    def replaces(parameters: dict[str, Tensor], _: str, __: Tensor) -> None:
        parameters["x"].data = torch.zeros(4)

    model = Model(replaces, x=(4,))
    before = model.x.clone()
    with pytest.raises(EngineMismatch, match=r"replaces parameters.*: x"):
        trace_load_weights(model, [HFTensor("x", torch.float32, (4,))], CPU)
    assert torch.equal(model.x, before)


def test_coverage_names_the_gap() -> None:
    rows = ShapedView(0, (3, 5), (5, 1))
    assert times_covered([rows, ShapedView(15, (1, 5), (5, 1))], (4, 5)).exactly_once
    gap = times_covered([rows], (7, 5))
    assert str(gap) == "[3:7, 0:5] (20 elements)"
    twice = times_covered([rows, rows], (3, 5))
    assert not twice.exactly_once
    assert twice.gap is None
    assert times_covered([], ()).missing == 1


@st.composite
def tensor_and_views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[ShapedView]]:
    """A tensor's shape and strides (possibly transposed), and views of it: boxes in any dimension order, some flattened."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    base = torch.empty(shape, device="meta")
    tensor = base.permute(*draw(st.permutations(range(len(shape)))))

    def views() -> Iterator[ShapedView]:
        for _ in range(draw(st.integers(0, 4))):
            view = tensor
            for dim, size in enumerate(tensor.shape):
                start = draw(st.integers(0, size - 1))
                view = view.narrow(dim, start, draw(st.integers(1, size - start)))
            view = view.permute(*draw(st.permutations(range(view.dim()))))
            if draw(st.booleans()) and view.is_contiguous():
                view = view.view(-1)
            yield ShapedView(view.storage_offset(), tuple(view.shape), view.stride())

    return tuple(tensor.shape), tensor.stride(), list(views())


@settings(max_examples=200, deadline=None)
@given(tensor_and_views())
def test_coverage_equals_counting_every_element(case: tuple[tuple[int, ...], tuple[int, ...], list[ShapedView]]) -> None:
    shape, strides, views = case
    storage = torch.zeros(torch.Size(shape).numel(), dtype=torch.int64)
    tensor = storage.as_strided(shape, strides)
    for view in views:
        view.of(tensor).add_(1)
    coverage = times_covered(views, shape, strides)
    assert coverage.exactly_once == bool((tensor == 1).all())
    assert coverage.missing == int((tensor == 0).sum())
    if coverage.missing:
        holes = (tensor == 0).nonzero()
        assert coverage.gap == tuple(zip(holes.amin(0).tolist(), (holes.amax(0) + 1).tolist(), strict=True))


def test_digests_of_landings_add_up_to_the_tensors() -> None:
    model = Model(fused, qkv=(12, 8))
    tensors = {name: torch.randn(rows, 8) for name, rows in (("q", 6), ("k", 3), ("v", 3))}
    trace = trace_of(model, **{name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model.load_weights(iter(tensors.items()))
    for name, tensor in tensors.items():
        parts = [
            digest_strided(
                landing.target.of(model.qkv.data),
                columns=tensor.shape[-1],
                offset=landing.source.offset,
                strides=landing.source.strides,
            )
            for landing in trace.landings[name]
        ]
        assert add(*parts) == digest(tensor)
