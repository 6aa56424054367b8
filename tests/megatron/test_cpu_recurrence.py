"""The pure-torch kernels of recurrent layers against the recurrences themselves, one position after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_near, rounding
from torch import Tensor

from mbridge_rl.megatron.cpu import recurrence as cpu_recurrence

LENGTH, BATCH, HEADS, GROUPS, HEAD_DIM, STATE = 21, 2, 4, 2, 3, 5

# A chunk of the kernel sums over all positions before each, the recurrence adds one after the other; gradients go back alike.
ROUNDING = rounding(LENGTH, 2 * LENGTH)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def _sequences(kind: str) -> Tensor | None:
    """Two packed sequences in one row and three in the other, none as long as a chunk."""
    if kind == "one":
        return None
    return torch.tensor([[0] * 9 + [1] * 12, [0] * 1 + [1] * 13 + [2] * 7])


def _scan_one_by_one(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
    b, c = (part.repeat_interleave(HEADS // GROUPS, 2) for part in (b, c))
    state, outputs = torch.zeros(BATCH, HEADS, HEAD_DIM, STATE), []
    for t in range(LENGTH):
        if ids is not None and t > 0:
            state = state * (ids[:, t] == ids[:, t - 1])[:, None, None, None]
        state = (dt[:, t] * decay).exp()[..., None, None] * state
        state = state + dt[:, t, :, None, None] * x[:, t, ..., None] * b[:, t, :, None]
        outputs.append((state * c[:, t, :, None]).sum(-1))
    return torch.stack(outputs, 1)


def _delta_one_by_one(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    state, outputs = torch.zeros(BATCH, HEADS, STATE, HEAD_DIM), []
    for t in range(LENGTH):
        state = state * log_decay[:, t, :, None, None].exp()
        error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * STATE**-0.5)
    return torch.stack(outputs, 1)


def _assert_equal_with_gradients(computed: Callable[[], Tensor], expected: Callable[[], Tensor], inputs: list[Tensor]) -> None:
    values = [function() for function in (computed, expected)]
    assert_near(*values, ROUNDING)
    weights = _random(*values[0].shape, seed=9).detach()
    gradients = [torch.autograd.grad((value * weights).sum(), inputs) for value in values]
    for ours, theirs in zip(*gradients, strict=True):
        assert_near(ours, theirs, ROUNDING)


@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("packed", ["one", "packed"])
def test_mamba_scan(chunk: int, packed: str) -> None:
    x, b, c = _random(BATCH, LENGTH, HEADS, HEAD_DIM), *(_random(BATCH, LENGTH, GROUPS, STATE, seed=s) for s in (1, 2))
    dt, decay = (
        part.abs().detach().requires_grad_() for part in (_random(BATCH, LENGTH, HEADS, seed=3), _random(HEADS, seed=4))
    )
    ids, inputs = _sequences(packed), [x, dt, decay, b, c]
    _assert_equal_with_gradients(
        lambda: cpu_recurrence.mamba_scan(x, dt, -decay, b, c, chunk, ids),
        lambda: _scan_one_by_one(x, dt, -decay, b, c, ids),
        inputs,
    )


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_gated_delta_rule(chunk: int) -> None:
    query, key = (_random(BATCH, LENGTH, HEADS, STATE, seed=s) for s in (0, 1))
    value, gate, rate = (
        _random(BATCH, LENGTH, HEADS, HEAD_DIM, seed=2),
        *(_random(BATCH, LENGTH, HEADS, seed=s) for s in (3, 4)),
    )
    inputs = [query, key, value, gate, rate]

    def arguments() -> tuple[Tensor, ...]:
        return query, cpu_recurrence.l2norm(key), value, -F.softplus(gate), rate.sigmoid()

    _assert_equal_with_gradients(
        lambda: cpu_recurrence.gated_delta_rule(*arguments(), chunk=chunk), lambda: _delta_one_by_one(*arguments()), inputs
    )


LENGTHS = (9, 0, 12)  # an empty sequence changes nothing
OFFSETS = torch.tensor([0, 9, 9, 21])


def test_packed_gated_delta_rule() -> None:
    """Every sequence of the one packed row is computed by itself, as fla's kernel does for Megatron-core 0.18 and newer."""
    query, key = (_random(1, LENGTH, HEADS, STATE, seed=s) for s in (0, 1))
    value = _random(1, LENGTH, HEADS, HEAD_DIM, seed=2)
    decay, rate = -F.softplus(_random(1, LENGTH, HEADS, seed=3)), _random(1, LENGTH, HEADS, seed=4).sigmoid()
    inputs = [query, cpu_recurrence.l2norm(key), value, decay, rate]
    output, state = cpu_recurrence.chunk_gated_delta_rule(*inputs, cu_seqlens=OFFSETS)
    parts = zip(*(part.split(LENGTHS, dim=1) for part in inputs), strict=True)
    expected = [cpu_recurrence.chunk_gated_delta_rule(*sequence)[0] for sequence in parts if sequence[0].shape[1]]
    assert state is None
    assert torch.equal(output, torch.cat(expected, 1))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_of_gated_delta_nets(packed: bool, activation: str | None) -> None:
    """fla's function equals torch's convolution of every sequence by itself, followed by the activation."""
    x, weight, bias = _random(1, LENGTH, 6), _random(6, 4, seed=1), _random(6, seed=2)
    options = {"activation": activation, "cu_seqlens": OFFSETS if packed else None}
    output, state = cpu_recurrence.causal_conv1d(x, weight, bias, **options)
    lengths = [length for length in LENGTHS if length] if packed else [LENGTH]
    parts = [F.conv1d(F.pad(part.T, (3, 0)), weight[:, None], bias, groups=6).T for part in x[0].split(lengths)]
    expected = torch.cat(parts)
    assert state is None
    assert_near(output[0], expected if activation is None else F.silu(expected), ROUNDING)


@pytest.mark.parametrize("option", [{"activation": "relu"}, {"output_final_state": True}, {"initial_state": torch.zeros(1)}])
def test_what_the_convolution_does_not_have_is_refused(option: dict[str, object]) -> None:
    with pytest.raises(NotImplementedError, match="no initial or final state, and no activation but silu"):
        cpu_recurrence.causal_conv1d(torch.zeros(1, 3, 2), torch.zeros(2, 4), **option)  # type: ignore[arg-type]


def test_strong_decay_stays_finite() -> None:
    """A decay of exp(-100) per step: exponents of the masked half would overflow, and its gradients be NaN."""
    x, b = torch.ones(1, LENGTH, 1, 1, requires_grad=True), torch.ones(1, LENGTH, 1, 1)
    y = cpu_recurrence.mamba_scan(x, torch.full((1, LENGTH, 1), 100.0), torch.tensor([-1.0]), b, b, 16)
    y.sum().backward()
    assert_near(y, torch.full_like(y, 100.0), ROUNDING)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("packed", ["one", "packed"])
def test_causal_convolution(packed: str) -> None:
    x, weight, bias, ids = _random(BATCH, LENGTH, 6), _random(6, 4, seed=1), _random(6, seed=2), _sequences(packed)
    output = cpu_recurrence.causal_convolution(x, weight, bias, ids)
    for row in range(BATCH):
        lengths = [LENGTH] if ids is None else ids[row].unique_consecutive(return_counts=True)[1].tolist()
        parts = [F.conv1d(F.pad(part.T, (3, 0)), weight[:, None], bias, groups=6).T for part in x[row].split(lengths)]
        assert_near(output[row], torch.cat(parts), ROUNDING)


def test_whole_mamba_kernel() -> None:
    """The full kernel computes gate, convolution, time step and skip connection, and reads columns in Mamba's order."""
    inner, shared = HEADS * HEAD_DIM, GROUPS * STATE
    columns = _random(BATCH, LENGTH, 2 * inner + 2 * shared + HEADS)
    weight, bias = _random(inner + 2 * shared, 4, seed=1), _random(inner + 2 * shared, seed=2)
    dt_bias, skip, decay = (_random(HEADS, seed=s) for s in (3, 4, 5))
    output = cpu_recurrence.mamba_split_conv1d_scan_combined(
        columns, weight, bias, dt_bias, -decay.exp(), skip, 8, headdim=HEAD_DIM, ngroups=GROUPS, norm_before_gate=False
    )
    z, x, b, c, dt = columns.split([inner, inner, shared, shared, HEADS], -1)
    convolved = F.silu(cpu_recurrence.causal_convolution(torch.cat([x, b, c], -1), weight, bias))
    x, b, c = convolved.split([inner, shared, shared], -1)
    x = x.view(BATCH, LENGTH, HEADS, HEAD_DIM)
    b, c = (part.view(BATCH, LENGTH, GROUPS, STATE) for part in (b, c))
    y = _scan_one_by_one(x, F.softplus(dt + dt_bias), -decay.exp(), b, c, None) + skip[:, None] * x
    assert_near(output, y.flatten(2) * F.silu(z), ROUNDING)


def test_gated_norm_normalises_groups() -> None:
    norm = cpu_recurrence.GatedRMSNorm(8, eps=1e-3, group_size=4)
    norm.weight.data = _random(8, seed=1).detach()
    x, z = _random(3, 8), _random(3, 8, seed=2)
    gated = x * F.silu(z)
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt() for part in gated.split(4, -1)]
    assert_near(norm(x, z), torch.cat(parts, -1) * norm.weight, ROUNDING)
