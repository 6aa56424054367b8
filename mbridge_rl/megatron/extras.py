"""Adds a spec's extras to the modules that Megatron built: hooks and small modules, one function per kind.

Hooks see what Megatron's own forward pass sees, so schedules, recomputation and every parallel axis work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.extras import EmbeddingScale, Extra, LogitScale, LogitSoftcap, PlainNorm


def add_extras(model: nn.Module, extras: Sequence[Extra]) -> None:
    """Changes one chunk as built, before it is wrapped and before weights are loaded. What it lacks (an intermediate
    pipeline stage has no embedding) is passed over."""
    for extra in extras:
        _ADD[type(extra)](model, extra)


def _scale_embeddings(model: nn.Module, extra: EmbeddingScale) -> None:
    def scaled(_: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
        return embeddings * torch.tensor(extra.factor, dtype=embeddings.dtype)

    if hasattr(model, "embedding"):
        model.embedding.register_forward_hook(scaled)


def logit_changes(extras: Sequence[Extra]) -> list[Callable[[Tensor], Tensor]]:
    """What the extras do to logits, in order; each acts element by element, so that it does not matter how the vocabulary or
    the tokens are cut."""
    return [_LOGIT_CHANGES[type(extra)](extra) for extra in extras if type(extra) in _LOGIT_CHANGES]


_LOGIT_CHANGES: dict[type, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    LogitScale: lambda extra: lambda logits: logits * extra.factor,
    LogitSoftcap: lambda extra: lambda logits: extra.cap * torch.tanh(logits / extra.cap),
}


def _change_logits(model: nn.Module, extra: LogitScale | LogitSoftcap) -> None:
    change = _LOGIT_CHANGES[type(extra)](extra)

    def changed(_: nn.Module, __: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output
        return change(logits), bias

    if hasattr(model, "output_layer"):
        model.output_layer.register_forward_hook(changed)


def _make_norm_plain(model: nn.Module, extra: PlainNorm) -> None:
    """Its weight starts at one, as plain norms' do."""
    for name, module in model.named_modules():
        if name.endswith(f".{extra.module}"):
            module.zero_centered_gamma = False
            nn.init.ones_(module.weight)


_ADD: dict[type, Callable[[nn.Module, Any], None]] = {
    EmbeddingScale: _scale_embeddings,
    LogitScale: _change_logits,
    LogitSoftcap: _change_logits,
    PlainNorm: _make_norm_plain,
}
