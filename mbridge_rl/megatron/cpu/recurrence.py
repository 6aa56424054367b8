"""`mamba_ssm` and `fla` in pure torch, for Megatron's Mamba and gated delta net layers on machines without CUDA.

Both recurrences run chunk by chunk: inside a chunk every position depends on the earlier ones through a `[chunk, chunk]`
product, and a state carries the positions before the chunk. Memory grows with `length * chunk`, not with `length ** 2`; all
sums are fp32.

`causal_conv1d` exists, too, but only for Megatron's version tests for packed sequences: its function is `None`, so that
Megatron uses a plain convolution.
"""

from __future__ import annotations

import importlib.machinery
import types
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 64

# The versions for Megatron's version tests: packed sequences need at least 2.0 and 1.4.
_VERSIONS = {"mamba_ssm": "2.3.0", "causal_conv1d": "1.6.0", "fla": "0.4.0"}


def mamba_scan(
    x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk: int = _CHUNK, sequence_ids: Tensor | None = None
) -> Tensor:
    """The state space duality of Mamba-2 (arXiv 2405.21060, section 6): for every head

        state_t = exp(dt_t * decay) * state_{t-1} + dt_t * x_t b_t^T        y_t = state_t c_t

    Args:
        x: `[batch, length, heads, head_dim]`, any dtype.
        dt: `[batch, length, heads]`, positive.
        decay: `[heads]`, negative.
        b, c: `[batch, length, groups, state]`; each group serves `heads / groups` heads in a row.
        sequence_ids: `[batch, length]`; the state starts anew where the id changes. `None` means one sequence.

    Returns:
        `y`, fp32, of x's shape.
    """
    x, dt, b, c = x.float(), dt.float(), b.float(), c.float()
    copies = x.shape[2] // b.shape[2]
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[3])
    output = []
    for start, stop in _chunks(x.shape[1], chunk):
        rate = dt[:, start:stop]
        inputs = x[:, start:stop] * rate[..., None]
        keys, queries = (part[:, start:stop].repeat_interleave(copies, 2) for part in (b, c))
        total = (rate * decay).cumsum(1)
        same, from_state, to_state, keep = _connections(sequence_ids, start, stop)
        reach = _decay_between(total, same)
        scores = torch.einsum("bthn,bshn->bhts", queries, keys) * reach
        within = torch.einsum("bhts,bshp->bthp", scores, inputs)
        before = torch.einsum("bthn,bhpn->bthp", queries, state) * (total.exp() * from_state)[..., None]
        output.append(within + before)
        left = (total[:, -1:] - total).exp() * to_state
        state = state * (total[:, -1].exp() * keep)[..., None, None]
        state = state + torch.einsum("bshp,bshn->bhpn", inputs * left[..., None], keys)
    return torch.cat(output, 1)


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, chunk: int = _CHUNK) -> Tensor:
    """The gated delta rule (arXiv 2412.06464): for every head, with `state [key_dim, value_dim]`

        state_t = a_t * state_{t-1} + k_t u_t^T,   u_t = beta_t * (v_t - a_t * state_{t-1}^T k_t),   o_t = state_t^T q_t

    where `a_t = exp(log_decay_t)` and queries are scaled by `key_dim ** -0.5`. The `u` of a chunk solve one triangular system.

    Args:
        query, key: `[batch, length, heads, key_dim]`.
        value: `[batch, length, heads, value_dim]`.
        log_decay, beta: `[batch, length, heads]`.

    Returns:
        `o`, fp32, of value's shape.
    """
    query = query.float() * query.shape[-1] ** -0.5
    heads_first = [part.float().transpose(1, 2) for part in (query, key, value)]
    decays, betas = (part.float().transpose(1, 2) for part in (log_decay, beta))
    state = value.new_zeros(value.shape[0], value.shape[2], key.shape[-1], value.shape[-1], dtype=torch.float32)
    output = []
    for start, stop in _chunks(value.shape[1], chunk):
        q, k, v = (part[:, :, start:stop] for part in heads_first)
        total, rate = decays[:, :, start:stop].cumsum(-1), betas[:, :, start:stop, None]
        reach = _decay_between(total.transpose(1, 2))
        system = rate * (k @ k.mT) * reach
        system = system.tril(-1) + torch.eye(stop - start, device=k.device)
        error = rate * (v - total.exp()[..., None] * (k @ state))
        update = torch.linalg.solve_triangular(system, error, upper=False, unitriangular=True)
        output.append(total.exp()[..., None] * (q @ state) + (q @ k.mT * reach) @ update)
        left = (total[:, :, -1:] - total).exp()[..., None]
        state = total[:, :, -1, None, None].exp() * state + (k * left).mT @ update
    return torch.cat(output, 2).transpose(1, 2)


def _chunks(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + chunk, length)) for start in range(0, length, chunk))


def _decay_between(total: Tensor, same: Tensor | None = None) -> Tensor:
    """`[batch, heads, t, s]`: the decay from position `s` to `t`; zero for later positions and, by `same [batch, t, s]`, for
    other sequences. Their exponents are masked first, since they could overflow, and NaN gradients would not vanish."""
    total = total.transpose(1, 2)
    exponent = total[..., :, None] - total[..., None, :]
    visible = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=total.device).tril()
    if same is not None:
        visible = visible & same[:, None]
    return exponent.masked_fill(~visible, float("-inf")).exp()


def _connections(sequence_ids: Tensor | None, start: int, stop: int) -> tuple[Any, Any, Any, Any]:
    """Masks of the connections in a chunk: which positions are in one sequence `[batch, t, s]`; which positions depend on the
    state before the chunk, and which contribute to the state after it, `[batch, t, 1]` each; and whether the state before the
    chunk contributes to the state after it, `[batch, 1]`."""
    if sequence_ids is None:
        return None, 1.0, 1.0, 1.0
    ids = sequence_ids[:, start:stop]
    before = sequence_ids[:, max(start - 1, 0), None]
    last = ids[:, -1:]
    return ids[:, :, None] == ids[:, None], (ids == before)[..., None], (ids == last)[..., None], last == before


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, sequence_ids: Tensor | None = None) -> Tensor:
    """Every channel's weighted sum of its last `width` inputs, within a sequence.

    Args:
        x: `[batch, length, channels]`.
        weight: `[channels, width]`, the newest input last.
        sequence_ids: `[batch, length]`, `None` for one sequence.
    """
    length, width = x.shape[1], weight.shape[1]
    total = x * weight[:, -1]
    for back in range(1, min(width, length)):
        earlier = x[:, : length - back]
        if sequence_ids is not None:
            earlier = earlier * (sequence_ids[:, : length - back] == sequence_ids[:, back:])[..., None]
        total = total + F.pad(earlier * weight[:, -1 - back], (0, 0, back, 0))
    return total if bias is None else total + bias


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """mamba_ssm's training kernel between Megatron's input projection and its gated norm.

    Args:
        zxbcdt: `[batch, length, 2 * inner + 2 * groups * state + heads]`: gate, input, B, C, time step.
        conv1d_weight: `[inner + 2 * groups * state, width]`.
        D: `[heads]`, or `[heads, head_dim]`.

    Returns:
        `[batch, length, inner]`, gated by `silu(z)`, in the dtype of `zxbcdt`.
    """
    if activation not in ("silu", "swish"):
        raise NotImplementedError(f"mamba_ssm's kernel knows the activation silu only, found {activation!r}")
    heads, head_dim = A.shape[0], headdim or D.shape[1]
    inner, channels = heads * head_dim, conv1d_weight.shape[0]
    z, xbc, dt = zxbcdt.split([inner, channels, heads], -1)
    xbc = F.silu(causal_convolution(xbc.float(), conv1d_weight.float(), conv1d_bias, seq_idx)).to(zxbcdt.dtype)
    x, b, c = xbc.split([inner, (channels - inner) // 2, (channels - inner) // 2], -1)
    x = x.unflatten(-1, (heads, head_dim))
    dt = F.softplus(dt.float() + dt_bias)
    y = mamba_scan(x, dt, A, *(part.unflatten(-1, (ngroups, -1)) for part in (b, c)), chunk_size, seq_idx)
    y = y + (D if D.dim() == 2 else D[:, None]) * x.float()
    return (y.flatten(-2) * F.silu(z.float())).to(zxbcdt.dtype)


class GatedRMSNorm(nn.Module):
    """mamba_ssm's `RMSNorm`: `weight [hidden]`, normalised in groups of `group_size`; a gate, if given, comes first."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        gated = x.float() if z is None else x.float() * F.silu(z.float())
        groups = gated.unflatten(-1, (-1, self.group_size))
        normalized = F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2)
        return (normalized * self.weight.float()).to(x.dtype)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """fla's training kernel with the options that Megatron uses; `gated_delta_rule` describes the shapes.

    Args:
        cu_seqlens: `[sequences + 1]`, where packed sequences begin and the last one ends, in a batch of one row.
    """
    if initial_state is not None or output_final_state or use_qk_l2norm_in_kernel:
        raise NotImplementedError("on a CPU the gated delta rule has no initial or final state, and no norm of its own")
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = (slice(start, stop) for start, stop in pairwise(bounds) if stop > start)
    outputs = [gated_delta_rule(*(part[:, sequence] for part in (q, k, v, g, beta))) for sequence in sequences]
    return torch.cat(outputs, 1).to(v.dtype), None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """fla's convolution, with the options that Megatron uses. Up to Megatron-core 0.17 gated delta nets use `torch.nn.Conv1d`
    instead.

    Args:
        x: `[batch, length, channels]`.
        weight: `[channels, width]`, the newest input last.
        cu_seqlens: `[sequences + 1]`, where packed sequences begin and the last one ends, in a batch of one row.
    """
    if initial_state is not None or output_final_state or activation not in (None, "silu", "swish"):
        raise NotImplementedError("on a CPU fla's convolution has no initial or final state, and no activation but silu")
    sequence_ids = None
    if cu_seqlens is not None:
        sequence_ids = torch.bucketize(torch.arange(x.shape[1], device=x.device), cu_seqlens[1:], right=True).unsqueeze(0)
    y = causal_convolution(x.float(), weight.float(), None if bias is None else bias.float(), sequence_ids)
    return (y if activation is None else F.silu(y)).to(x.dtype), None


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """fla's norm, `x / sqrt(|x|^2 + eps)` over the last dimension, computed in fp32."""
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def build_modules() -> dict[str, types.ModuleType]:
    """The module trees, by their names in `sys.modules`."""
    contents: dict[str, dict[str, Any]] = {
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedRMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
            "mamba_chunk_scan_combined": None,
        },
        "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": None},
        "causal_conv1d": {"causal_conv1d_fn": None, "causal_conv1d_update": None},
        "fla.modules.convolution": {"causal_conv1d": causal_conv1d},
        "fla.modules.l2norm": {"l2norm": l2norm},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    }
    modules: dict[str, types.ModuleType] = {}
    for path, attributes in contents.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in modules:
                modules[name] = types.ModuleType(name)
                modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
                modules[name].__path__ = []
        vars(modules[path]).update(attributes)
    for name, version in _VERSIONS.items():
        modules[name].__version__ = version  # type: ignore[attr-defined]
    return modules
