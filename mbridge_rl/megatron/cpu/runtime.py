"""Megatron-core without CUDA, inside a scope.

    with megatron_runtime():
        ...import, build, run, train Megatron models...

With a GPU the scope only checks that the real Transformer Engine is installed. Without a GPU, it replaces `torch.cuda`, two
collectives of `torch.distributed`, a few functions of Megatron, and the packages in `_KERNELS` by pure-torch versions, and
restores them when it closes: vLLM, Transformers and accelerate in the same process test for these packages to decide what they
may use.

Scopes nest. The device redirection acts only in the thread that entered the scope; the patched attributes are process-wide, so
other threads see them while any scope is open. A generator must not hold a scope across a `yield`: its caller would run in it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from mbridge_rl.core.errors import missing_extra
from mbridge_rl.megatron.cpu import device as cpu_device
from mbridge_rl.megatron.versions.release import check_release

_MISSING = object()
_TE = "transformer_engine"
_KERNELS = (_TE, "mamba_ssm", "causal_conv1d", "fla")


class _Runtime:
    """The patches of this process: the number of open scopes, and the original values."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._scopes = 0
        self._replaced: list[tuple[Any, str, Any]] = []
        self._hidden_modules: dict[str, ModuleType] = {}
        self._kernel_modules: dict[str, ModuleType] = {}
        self._quiet = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            if self._scopes == 0:
                self._install()
            self._scopes += 1
        depth = getattr(self._thread, "depth", 0)
        if depth == 0:
            self._thread.mode = cpu_device.CudaToCpu()
            self._thread.mode.__enter__()
        self._thread.depth = depth + 1

    def leave(self) -> None:
        self._thread.depth -= 1
        if self._thread.depth == 0:
            self._thread.mode.__exit__(None, None, None)
        with self._lock:
            self._scopes -= 1
            if self._scopes == 0:
                self._restore()

    def _install(self) -> None:
        try:
            self._quiet.enter_context(_quiet_megatron())
            self._swap_kernels_in()
            self._patch(cpu_device.device_patches())
            self._patch(cpu_device.megatron_patches(*_import_megatron()))
        except BaseException:
            self._restore()
            raise

    def _patch(self, patches: list[cpu_device.Patch]) -> None:
        for owner, name, value in patches:
            self._replaced.append((owner, name, getattr(owner, name, _MISSING)))
            setattr(owner, name, value)

    def _restore(self) -> None:
        while self._replaced:
            owner, name, value = self._replaced.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        for name in _kernel_names():
            del sys.modules[name]
        sys.modules.update(self._hidden_modules)
        self._hidden_modules = {}
        self._quiet.close()

    def _swap_kernels_in(self) -> None:
        if not self._kernel_modules:
            # Imported here and not at the top, since it is not needed with a GPU.
            from mbridge_rl.megatron.cpu import recurrence as cpu_recurrence
            from mbridge_rl.megatron.cpu import transformer_engine as cpu_transformer_engine

            self._kernel_modules = cpu_transformer_engine.build_modules() | cpu_recurrence.build_modules()
        self._hidden_modules = {name: sys.modules.pop(name) for name in _kernel_names()}
        sys.modules.update(self._kernel_modules)


def _kernel_names() -> list[str]:
    return [name for name in sys.modules if name.split(".", 1)[0] in _KERNELS]


def _import_megatron() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Imports Megatron-core, or checks that an earlier import of it found Transformer Engine.

    Raises:
        ImportError: Megatron-core is not installed, is too old, or was imported outside of the scope and found no Transformer
            Engine.
    """
    with _without_torch_compile():
        check_release()
        random = importlib.import_module("megatron.core.tensor_parallel.random")
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        token_dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
        extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    if not extension.HAVE_TE:
        raise ImportError(
            "megatron.core was imported before mbridge_rl could provide Transformer Engine, and works without it now. "
            "Import mbridge_rl.megatron.cpu.runtime and enter megatron_runtime() before the first `import megatron.core`."
        )
    return random, moe_utils, token_dispatcher


@contextlib.contextmanager
def _quiet_megatron() -> Iterator[None]:
    """Suppresses Megatron's warnings about missing CUDA kernels, which this runtime replaces, and about deprecated names of
    torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
        # Recomputation reads the gradients of non-leaves; to torch the caller is the mode in `device`.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"mbridge_rl\.megatron\.cpu\.device")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
        yield


@contextlib.contextmanager
def _without_torch_compile() -> Iterator[None]:
    """Turns `torch.compile` off while Megatron is imported: it wraps small functions in it, which costs seconds on a CPU
    without a benefit."""
    compile_function = torch.compile
    torch.compile = _unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def _unchanged(function: Any = None, **_: Any) -> Any:
    return _unchanged if function is None else function


def _require_real_transformer_engine() -> None:
    if importlib.util.find_spec(_TE) is None:
        raise missing_extra("Megatron-core's models on a GPU need Transformer Engine, which is not installed", "te")


_runtime = _Runtime()


@contextlib.contextmanager
def megatron_runtime() -> Iterator[None]:
    """A scope in which Megatron-core models can be imported, built and trained on this machine, with or without a GPU.
    Re-entrant.

    Raises:
        ImportError: Megatron-core or (with a GPU) Transformer Engine is missing, Megatron-core is too old, or it was imported
            outside of the scope on a machine without a GPU. Nothing stays patched.
    """
    if torch.cuda.is_available():
        _require_real_transformer_engine()
        check_release()
        yield
        return
    _runtime.enter()
    try:
        yield
    finally:
        _runtime.leave()
