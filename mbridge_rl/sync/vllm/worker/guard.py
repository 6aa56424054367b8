"""Keeps an engine from generating with weights that belong to no version."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from mbridge_rl.core.errors import EngineUnusable

_ENTRIES = ("forward", "compute_logits")  # the second is called in Python even if CUDA graphs replay the first


class ModelGuard:
    """Makes a model's entry points raise `EngineUnusable` from `block` until `release`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved: dict[str, Any] = {}
        self.reason: str | None = None

    def block(self, reason: str) -> None:
        """Refuses every further step; the error reports the newest reason."""
        if self.reason is None:
            self._saved = {name: self._model.__dict__[name] for name in _ENTRIES if name in self._model.__dict__}
            for name in _ENTRIES:
                self._model.__dict__[name] = self._refuse
        self.reason = reason

    def release(self) -> None:
        if self.reason is None:
            return
        for name in _ENTRIES:
            del self._model.__dict__[name]
        self._model.__dict__.update(self._saved)
        self.reason = None

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise EngineUnusable(self.reason)
