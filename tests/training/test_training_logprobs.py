"""Vocabulary-parallel log-probabilities against the dense computation."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tolerance import assert_near, rounding
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mbridge_rl.training.trainer.logprobs import projected_token_statistics, token_statistics

# A log-probability is a logit, here a product of 16, minus the logarithm of a sum over 16 exponentials and less. Entropies and
# gradients are sums of exponentials, whose relative errors are the absolute ones of logits.
ROUNDING = rounding(16, 3)


def _inputs(vocab: int, padded: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `[3, 7, padded]` whose padding is the largest of all, tokens, and the gradients of the two outputs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, padded, generator=generator) * 5
    logits[..., vocab:] = 100.0
    tokens = torch.randint(0, vocab, (3, 7), generator=generator)
    grads = torch.randn(2, 3, 7, generator=generator)
    return logits.to(dtype), tokens, grads[0], grads[1]


def _dense(logits: Tensor, tokens: Tensor, vocab: int, temperature: float, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    logits = logits.detach().clone().requires_grad_()
    log_p = (logits[..., :vocab].float() / temperature).log_softmax(-1)
    log_probs = log_p.gather(-1, tokens[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (log_probs * grads[0] + entropy * grads[1]).sum().backward()
    return [log_probs.detach(), entropy.detach(), log_p.argmax(-1) == tokens, logits.grad]


def _parallel(rank: int, vocab: int, padded: int, temperature: float, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    logits, tokens, *grads = _inputs(vocab, padded, dtype)
    mine = logits.chunk(dist.get_world_size(), dim=-1)[rank].clone().requires_grad_()
    statistics = token_statistics(mine, tokens, vocab, group=dist.group.WORLD, temperature=temperature, **options)
    (statistics.log_probs * grads[0] + statistics.entropy * grads[1]).sum().backward()
    return [*(value.detach() for value in statistics), mine.grad]


@pytest.mark.parametrize(
    ("world_size", "vocab", "padded"),
    [(1, 13, 13), (2, 13, 14), (4, 13, 16), (4, 9, 12)],  # at last a rank that holds nothing but padding
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_dense_computation_in_values_and_gradients(
    world_size: int, vocab: int, padded: int, temperature: float
) -> None:
    logits, tokens, *grads = _inputs(vocab, padded)
    expected = _dense(logits, tokens, vocab, temperature, tuple(grads))
    results, size = run_ranks(_parallel, world_size, vocab, padded, temperature, torch.float32), expected[0].abs().max().item()
    for log_probs, entropy, greedy, _ in results:
        assert_near(log_probs, expected[0], ROUNDING, what="log-probabilities")
        assert_near(entropy, expected[1], ROUNDING, scale=size, what="entropies")
        assert torch.equal(greedy, expected[2])
    grad = torch.cat([result[3] for result in results], dim=-1)
    assert_near(grad, expected[3], ROUNDING, scale=size, what="gradients")
    assert not grad[..., vocab:].any()


def test_bf16_logits_are_reduced_in_fp32() -> None:
    logits, tokens, *grads = _inputs(13, 14, torch.bfloat16)
    expected = _dense(logits, tokens, 13, 1.0, tuple(grads))
    results = run_ranks(_parallel, 2, 13, 14, 1.0, torch.bfloat16)
    assert_near(results[0][0], expected[0], ROUNDING, what="log-probabilities")
    grad = torch.cat([result[3] for result in results], dim=-1)
    assert grad.dtype == torch.bfloat16
    assert_near(grad, expected[3], rounding(1, dtype=torch.bfloat16))


def test_chunks_change_no_bit() -> None:
    logits, tokens, *grads = _inputs(13, 13)
    results = []
    for max_elements in (1, 40, 1 << 20):
        mine = logits.clone().requires_grad_()
        statistics = token_statistics(mine, tokens, 13, max_elements=max_elements)
        (statistics.log_probs * grads[0] + statistics.entropy * grads[1]).sum().backward()
        results.append((*statistics, mine.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class _LargestFloat(TorchDispatchMode):
    """The largest fp32 tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_more_fp32_logits_than_stated_exist() -> None:
    logits = torch.randn(64, 1001, dtype=torch.bfloat16).requires_grad_()
    tokens = torch.randint(0, 1001, (64,))
    with _LargestFloat() as seen:
        statistics = token_statistics(logits, tokens, 1001, max_elements=5000)
        (statistics.log_probs + statistics.entropy).sum().backward()
    assert 0 < seen.elements <= 5000


def test_only_what_is_used_gets_a_gradient() -> None:
    logits = torch.randn(5, 11, requires_grad=True)
    statistics = token_statistics(logits, torch.arange(5), 11)
    assert not statistics.greedy.requires_grad
    statistics.entropy.sum().backward()
    # d H / d x sums up to zero over the vocabulary
    assert_near(logits.grad.sum(-1), torch.zeros(5), ROUNDING, scale=logits.grad.abs().sum(-1).max().item())


def test_bad_input_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="cannot hold a vocabulary of 12"):
        token_statistics(torch.zeros(2, 11), torch.zeros(2, dtype=torch.int64), 12)
    with pytest.raises(ValueError, match=r"logits \[2, 11\] must be tokens \[3\]"):
        token_statistics(torch.zeros(2, 11), torch.zeros(3, dtype=torch.int64), 11)
    with pytest.raises(ValueError, match=r"hidden states \[2, 4\] must be tokens .* weight \[12, 3\]"):
        projected_token_statistics(torch.zeros(2, 4), torch.zeros(12, 3), torch.zeros(2, dtype=torch.int64), 12)
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_statistics(torch.zeros(2, 11), torch.zeros(2, dtype=torch.int64), 11, temperature=0.0)


def _hidden_inputs(vocab: int, padded: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states `[3, 7, 16]`, output weight `[padded, 16]`, tokens, and the gradients of the two outputs."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(3, 7, 16, generator=generator), torch.randn(padded, 16, generator=generator)
    tokens = torch.randint(0, vocab, (3, 7), generator=generator)
    return hidden.to(dtype), weight.to(dtype), tokens, torch.randn(2, 3, 7, generator=generator)


def _cap(logits: Tensor) -> Tensor:
    return 3.0 * torch.tanh(logits / 3.0)


def _projected(rank: int, vocab: int, padded: int, change: Any, options: dict[str, Any]) -> list[Tensor]:
    hidden, weight, tokens, grads = _hidden_inputs(vocab, padded)
    hidden, mine = hidden.requires_grad_(), weight.chunk(dist.get_world_size())[rank].clone().requires_grad_()
    statistics = projected_token_statistics(hidden, mine, tokens, vocab, change=change, group=dist.group.WORLD, **options)
    (statistics.log_probs * grads[0] + statistics.entropy * grads[1]).sum().backward()
    dist.all_reduce(hidden.grad)  # each rank has its columns' part
    return [*(value.detach() for value in statistics), hidden.grad, mine.grad]


@pytest.mark.parametrize("change", [None, _cap], ids=["plain", "soft cap"])
@pytest.mark.parametrize(("world_size", "vocab", "padded"), [(1, 13, 13), (2, 13, 14), (4, 9, 12)])
def test_the_projection_in_chunks_equals_the_dense_one(change: Any, world_size: int, vocab: int, padded: int) -> None:
    hidden, weight, tokens, grads = _hidden_inputs(vocab, padded)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight[:vocab].t()
    log_p = ((logits if change is None else change(logits)) / 0.7).log_softmax(-1)
    log_probs, entropy = log_p.gather(-1, tokens[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    (log_probs * grads[0] + entropy * grads[1]).sum().backward()
    options = {"temperature": 0.7, "max_elements": 30}
    results, size = run_ranks(_projected, world_size, vocab, padded, change, options), log_probs.abs().max().item()
    for result in results:
        assert_near(result[0], log_probs, ROUNDING, what="log-probabilities")
        assert_near(result[1], entropy, ROUNDING, scale=size, what="entropies")
        assert torch.equal(result[2], log_p.argmax(-1) == tokens)
        assert_near(result[3], hidden.grad, ROUNDING, scale=size * hidden.grad.abs().max().item(), what="gradients")
    weight_grad = torch.cat([result[4] for result in results])
    assert_near(weight_grad, weight.grad, ROUNDING, scale=size * weight.grad.abs().max().item(), what="the weight's gradient")


def test_the_weights_gradient_is_summed_in_fp32() -> None:
    """A sum in bf16, chunk by chunk, would lose every term that is smaller than a 256th of it."""
    hidden, weight, tokens, grads = _hidden_inputs(13, 13, torch.bfloat16)
    hidden, tokens, grads = hidden.repeat(30, 1, 1), tokens.repeat(30, 1), grads.repeat(1, 30, 1)
    expected = None
    for max_elements in (1 << 20, 13):  # all at once, and one token at a time
        mine = weight.clone().requires_grad_()
        statistics = projected_token_statistics(hidden, mine, tokens, 13, max_elements=max_elements)
        (statistics.log_probs * grads[0]).sum().backward()
        assert mine.grad.dtype == torch.bfloat16
        expected = mine.grad if expected is None else expected
        assert_near(mine.grad, expected, rounding(1, dtype=torch.bfloat16))  # only the sum is rounded, once


def test_frozen_weights_get_no_gradient() -> None:
    hidden, weight, tokens, _ = _hidden_inputs(13, 13)
    statistics = projected_token_statistics(hidden.requires_grad_(), weight, tokens, 13)
    statistics.log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


class _Largest(TorchDispatchMode):
    """The largest `[tokens, vocab]` that any operation returns, and the most of them that are alive at a time."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.elements, self.alive, self.most = vocab, 0, 0, 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.vocab and len(tensor) != 16:
                self.elements = max(self.elements, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._storages.add(storage._cdata)
                    self.alive += 1
                    self.most = max(self.most, self.alive)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self._storages.discard(key)
        self.alive -= 1


@pytest.mark.parametrize(("change", "stated"), [(None, 4), (_cap, 8)], ids=["plain", "soft cap"])
@pytest.mark.parametrize("entropy", [False, True])
def test_no_more_logits_than_stated_exist(entropy: bool, change: Any, stated: int) -> None:
    hidden = torch.randn(64, 16, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(1001, 16, dtype=torch.bfloat16).requires_grad_()
    with _Largest(1001) as seen:
        tokens = torch.randint(0, 1001, (64,))
        statistics = projected_token_statistics(hidden, weight, tokens, 1001, change=change, max_elements=5000)
        (statistics.log_probs + statistics.entropy if entropy else statistics.log_probs).sum().backward()
    assert 0 < seen.elements <= 5000
    assert stated // 2 <= seen.most <= stated
