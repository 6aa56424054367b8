"""Frees the memory of a trainer while an engine on the same devices needs it, and restores it bit for bit.

Gradients are dropped, since every step begins with zeros. Weights and Adam's state move from an accelerator into host memory,
or from any device into files. Storages are emptied and filled again, so that every view into them (Megatron's buffers, shards
of the distributed optimizer) stays valid.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.training.trainer.optimizer_state import parameter_states

_BUFFER_BYTES = 64 << 20


@dataclass(frozen=True)
class Offloaded:
    """Attributes:
    weights, optimizer, gradients: number of bytes of this rank that were freed of each.
    """

    weights: int
    optimizer: int
    gradients: int


@contextmanager
def offloaded(
    model: Sequence[nn.Module], optimizer: Any, *, weights: bool, moments: bool, directory: str | Path | None
) -> Iterator[Offloaded]:
    """Frees a trainer's memory inside of the block; `MegatronTrainer.offloaded` describes it."""
    with ExitStack() as stack:
        folder = None
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".offload-", dir=directory)))
        parameters = [parameter for chunk in model for parameter in chunk.parameters()]
        weight_storages = _storages(parameters)
        optimizer_storages = _storages(_optimizer_tensors(optimizer)) if moments else {}
        optimizer_storages = {key: storage for key, storage in optimizer_storages.items() if key not in weight_storages}
        dropped = sum(_emptied(stack, storage, None, drop=True) for storage in _storages(_gradients(model)).values())
        freed = sum(_emptied(stack, storage, folder) for storage in optimizer_storages.values())
        moved = sum(_emptied(stack, storage, folder) for storage in weight_storages.values()) if weights else 0
        if moved:
            _hide(stack, parameters)
        yield Offloaded(moved, freed, dropped)


def _gradients(model: Sequence[nn.Module]) -> list[Tensor]:
    return [buffer.grad_data for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _optimizer_tensors(optimizer: Any) -> list[Tensor]:
    states = parameter_states(optimizer).values()
    return [tensor for state in states for tensor in (state.master, *state.moments.values())]


def _storages(tensors: Sequence[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each storage behind the tensors once, without those that cannot be emptied because they are shared memory."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return {key: storage for key, storage in storages.items() if storage.nbytes() and storage.resizable()}


def _emptied(stack: ExitStack, storage: torch.UntypedStorage, folder: Path | None, *, drop: bool = False) -> int:
    """Empties a storage until the stack unwinds, if its content can be dropped or moved elsewhere; returns the number of bytes
    freed."""
    size, device = storage.nbytes(), storage.device
    if drop:
        restore = Tensor.zero_
    elif folder is not None:
        restore = _in_file(folder / f"{len(list(folder.iterdir()))}.bin", storage)
    elif device.type != "cpu":
        restore = _in_host_memory(storage)
    else:
        return 0
    storage.resize_(0)

    def fill() -> None:
        storage.resize_(size)
        restore(_bytes(storage))

    stack.callback(fill)
    return size


def _in_file(path: Path, storage: torch.UntypedStorage) -> Any:
    """Writes a storage to a file and returns the function that reads it back. Both go through a small buffer, since a storage
    that NumPy has used cannot be emptied any more."""
    with path.open("wb") as file:
        for part in _bytes(storage).split(_BUFFER_BYTES):
            part.cpu().clone().numpy().tofile(file)

    def read(target: Tensor) -> None:
        with path.open("rb") as file:
            for part in target.split(_BUFFER_BYTES):
                part.copy_(torch.frombuffer(bytearray(file.read(len(part))), dtype=torch.uint8))

    return read


def _in_host_memory(storage: torch.UntypedStorage) -> Any:
    host_copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
    host_copy.copy_(_bytes(storage))
    return lambda target: target.copy_(host_copy)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _hide(stack: ExitStack, parameters: Sequence[Tensor]) -> None:
    """Gives parameters no elements until the stack unwinds: code that reads one gets an error about its shape, not freed
    memory."""
    for parameter in parameters:
        stack.callback(setattr, parameter, "data", parameter.data)
        parameter.data = parameter.data.new_empty(0)
