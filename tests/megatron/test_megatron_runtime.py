"""The scope that lets Megatron-core run without CUDA: what it changes, and that nothing of it stays."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mbridge_rl.megatron.cpu.runtime import megatron_runtime

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the runtime does nothing where there is a GPU")


KERNELS = ("transformer_engine", "mamba_ssm", "causal_conv1d", "fla")


def _surroundings() -> dict[str, Any]:
    """The global state that a scope could leave changed: functions of modules, torch's modes and imported kernels."""
    state: dict[str, Any] = {}
    for module in (torch, torch.cuda, dist):
        state |= {f"{module.__name__}.{name}": value for name, value in vars(module).items() if callable(value)}
    state["modes"] = torch._C._len_torch_function_stack()
    state["kernels"] = [name for name in sys.modules if name.split(".")[0] in KERNELS]
    for name in ("megatron.core.tensor_parallel.random", "megatron.core.transformer.moe.token_dispatcher"):
        state |= {f"{name}.{key}": value for key, value in vars(sys.modules[name]).items() if callable(value)}
    return state


@pytest.fixture
def imported() -> None:
    """Megatron's first import adds submodules to torch for good; that is no patch."""
    with megatron_runtime():
        pass


def test_scope_restores_everything(imported: None) -> None:
    before = _surroundings()
    with megatron_runtime():
        inside = _surroundings()
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
        assert all(importlib.util.find_spec(name) is not None for name in KERNELS)
    assert _surroundings() == before
    changed = {name for name in before if inside.get(name) is not before[name]}
    assert {"torch.cuda.current_device", "torch.distributed.all_gather", "modes", "kernels"} <= changed
    assert all(importlib.util.find_spec(name) is None for name in KERNELS)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_scopes_nest(imported: None) -> None:
    before = _surroundings()
    with megatron_runtime():
        outer = _surroundings()
        with megatron_runtime():
            assert _surroundings() == outer
        assert _surroundings() == outer, "an inner scope must not close the outer one"
        assert torch.zeros(1).cuda().device.type == "cpu"
    assert _surroundings() == before


def test_scope_restores_after_an_error(imported: None) -> None:
    before = _surroundings()
    with pytest.raises(ZeroDivisionError), megatron_runtime():
        raise ZeroDivisionError
    assert _surroundings() == before


def test_scope_puts_a_real_transformer_engine_back(imported: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = types.ModuleType("transformer_engine")
    monkeypatch.setitem(sys.modules, "transformer_engine", installed)
    with megatron_runtime():
        assert sys.modules["transformer_engine"] is not installed
    assert sys.modules["transformer_engine"] is installed


def test_device_redirection_stays_in_its_thread(imported: None) -> None:
    seen: list[int] = []
    with megatron_runtime():
        thread = threading.Thread(target=lambda: seen.append(torch._C._len_torch_function_stack()))
        thread.start()
        thread.join(timeout=10)
    assert seen == [0]


def test_scopes_of_two_threads_overlap(imported: None) -> None:
    before = _surroundings()
    entered, leave, errors = threading.Event(), threading.Event(), []

    def work() -> None:
        try:
            with megatron_runtime():
                entered.set()
                assert leave.wait(timeout=10)
                assert torch.zeros(1, device="cuda").device.type == "cpu", "the first thread's exit closed this scope"
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    with megatron_runtime():
        thread.start()
        assert entered.wait(timeout=10)
    leave.set()
    thread.join(timeout=10)
    assert not errors
    assert _surroundings() == before


def test_megatron_imported_outside_of_the_scope_is_an_error() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch, megatron.core\n"
        "from mbridge_rl.megatron.cpu.runtime import megatron_runtime\n"
        "before = torch.cuda.current_device\n"
        "try:\n"
        "    with megatron_runtime(): pass\n"
        "except ImportError as error:\n"
        "    assert torch.cuda.current_device is before\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "megatron.core was imported before" in done.stdout
