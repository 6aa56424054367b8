"""The pure-torch Transformer Engine against plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_near, rounding
from torch import Tensor

from mbridge_rl.megatron.context_parallel import context_parallel_positions
from mbridge_rl.megatron.cpu.runtime import megatron_runtime

# Imported in the scope: TE's tree reaches into Megatron, whose first import must find it.
with megatron_runtime():
    from mbridge_rl.megatron.cpu.attention import DotProductAttention
    from mbridge_rl.megatron.cpu.transformer_engine import GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm

# Three sums that follow each other, such as scores, those of their exponentials, and weighted values, over 9 positions at most.
ROUNDING = rounding(9, 3)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms(zero_centered: bool) -> None:
    x = _random(5, 3, 7) * 3 + 1
    rms, layer = (cls(7, eps=1e-3, zero_centered_gamma=zero_centered) for cls in (RMSNorm, LayerNorm))
    assert rms.weight.unique().item() == (0.0 if zero_centered else 1.0), "both start as the identity"
    for norm in (rms, layer):
        norm.weight.data = _random(7, seed=1)
    layer.bias.data = _random(7, seed=2)
    gamma = rms.weight + 1 if zero_centered else rms.weight
    assert_near(rms(x), _rms(x, gamma, 1e-3), ROUNDING)
    assert_near(layer(x), F.layer_norm(x, (7,), gamma, layer.bias, 1e-3), ROUNDING)
    assert rms.bias is None


def test_linear_returns_or_adds_its_bias() -> None:
    x = _random(4, 6)
    adds, returns = Linear(6, 5), Linear(6, 5, return_bias=True)
    for linear in (adds, returns):
        linear.weight.data, linear.bias.data = _random(5, 6, seed=1), _random(5, seed=2)
    output, bias = returns(x)
    assert_near(output + bias, adds(x), ROUNDING)
    assert torch.equal(output, x @ returns.weight.T)


@pytest.mark.parametrize("return_bias", [False, True])
def test_layer_norm_linear_returns_its_normalised_input(return_bias: bool) -> None:
    """TE's forms: out, (out, bias), (out, ln_out), (out, bias, ln_out); LoRA turns the flag on after construction."""
    module = LayerNormLinear(6, 5, normalization="RMSNorm", return_bias=return_bias)
    module.layer_norm_weight.data = _random(6, seed=1)
    x = _random(4, 2, 6)
    plain = module(x)
    module.return_layernorm_output = True
    *rest, ln_out = module(x)
    assert_near(ln_out, _rms(x, module.layer_norm_weight, 1e-5), ROUNDING)
    expected = list(plain) if return_bias else [plain]
    assert len(rest) == len(expected)
    assert all(torch.equal(mine, other) for mine, other in zip(rest, expected, strict=True))
    (rest[0].sum() + ln_out.sum()).backward()
    assert module.layer_norm_weight.grad is not None, "ln_out must carry gradients to the norm"


def test_grouped_linear_multiplies_each_expert_with_its_own_tokens() -> None:
    module = GroupedLinear(3, 4, 5, bias=False)
    x = _random(7, 4)
    expected = torch.cat([x[:2] @ module.weight0.T, x[2:2] @ module.weight1.T, x[2:] @ module.weight2.T])
    for splits in ([2, 0, 5], torch.tensor([2, 0, 5])):
        assert_near(module(x, splits), expected, ROUNDING)


def test_bf16_is_rounded_once() -> None:
    """The norm is computed in fp32, so bf16 in and out differ from the fp32 result by one rounding only."""
    module = RMSNorm(64, params_dtype=torch.bfloat16)
    x = _random(8, 64).bfloat16()
    assert torch.equal(module(x), _rms(x.float(), torch.ones(64), 1e-5).bfloat16())


def _attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, sink: Tensor | None = None) -> Tensor:
    """The formula, one query at a time. `[seq, batch, heads, dim]`; `hidden [q, k]`."""
    copies, output = query.shape[2] // key.shape[2], []
    for b in range(query.shape[1]):
        for h in range(query.shape[2]):
            for q in range(query.shape[0]):
                seen = (~hidden[q]).nonzero().flatten()
                scores = key[seen, b, h // copies] @ query[q, b, h] / math.sqrt(query.shape[-1])
                weights = scores.exp()
                total = weights.sum() + (0 if sink is None else sink[h].exp())
                output.append((weights / total) @ value[seen, b, h // copies])
    stacked = torch.stack(output).view(query.shape[1], query.shape[2], query.shape[0], -1)
    return stacked.permute(2, 0, 1, 3).flatten(2)


def _qkv(length: int = 9, value_dim: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return _random(length, 2, 4, 6), _random(length, 2, 2, 6, seed=1), _random(length, 2, 2, value_dim, seed=2)


def _causal(length: int) -> Tensor:
    return torch.ones(length, length).triu(1).bool()


@pytest.mark.parametrize("value_dim", [6, 3])
@pytest.mark.parametrize("options", [{}, {"window_size": (3, 0)}, {"softmax_type": "learnable"}], ids=str)
def test_attention(options: dict[str, Any], value_dim: int) -> None:
    query, key, value = _qkv(value_dim=value_dim)
    module = DotProductAttention(4, (6, value_dim), **options)
    hidden, sink = _causal(9), None
    if "window_size" in options:
        hidden |= torch.ones(9, 9).tril(-4).bool()
    if "softmax_type" in options:
        module.softmax_offset.data = sink = _random(4, seed=3)
    assert_near(module(query, key, value), _attention(query, key, value, hidden, sink), ROUNDING)


def test_attention_mask_counts_only_where_te_reads_it() -> None:
    query, key, value = _qkv()
    module = DotProductAttention(4, 6)
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[:, 0] = True
    mask[0, 0] = False
    shown = _attention(query, key, value, torch.zeros_like(mask))
    assert_near(module(query, key, value, mask, attn_mask_type="no_mask"), shown, ROUNDING)
    assert_near(
        module(query, key, value, mask[None, None], attn_mask_type="arbitrary"),
        _attention(query, key, value, mask),
        ROUNDING,
    )
    assert_near(module(query, key, value, mask, attn_mask_type="causal"), _attention(query, key, value, _causal(9)), ROUNDING)


def test_packed_sequences_do_not_see_each_other() -> None:
    query, key, value = (tensor[:, 0] for tensor in _qkv())
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    module = DotProductAttention(4, 6)
    packed = module(query, key, value, qkv_format="thd", attn_mask_type="padding_causal", cu_seqlens_q=offsets)
    apart = [module(*(t[a:b].unsqueeze(1) for t in (query, key, value))).squeeze(1) for a, b in ((0, 4), (4, 9))]
    assert_near(packed, torch.cat(apart), ROUNDING)


def test_context_parallel_positions_deal_every_token_once() -> None:
    offsets = [0, 8, 24]
    parts = [context_parallel_positions(offsets, rank, 2) for rank in range(2)]
    assert parts[0].tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
