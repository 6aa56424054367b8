"""The transport `files` writes parts to a directory that both ends mount, or to an object store, through fsspec. It is for ends
without a common network.

A part is one file. A worker reads a file when it has its full size; digests prove its content, as in every transport. The
folder of an update has a random name, so that files of another update are never taken for its own. In a mounted directory the
folder and the files are accessible to their user only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.distributed.private_files import write_new_file
from mbridge_rl.sync.payload.route import Part, Route, WorkerRoute
from mbridge_rl.sync.payload.wires import FilesWire
from mbridge_rl.sync.transports import Context, Outlet
from mbridge_rl.sync.transports.waiting import Timeout

_DEPTH = 3  # files under way per process


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)


def _make_folder(files: Any, root: str) -> None:
    if not _is_local(files):
        files.makedirs(root, exist_ok=False)
        return
    Path(root).parent.mkdir(parents=True, exist_ok=True)
    os.mkdir(root, 0o700)


def _is_local(files: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(files, LocalFileSystem)


def _name(worker: int, index: int, part: Part) -> str:
    return f"{worker}.{index}.{part.source_rank}"


class FilesOutlet:
    """Writes one file while the next part is packed."""

    def __init__(self, wire: FilesWire, largest: int, timeout: Timeout) -> None:
        self._files, self._root = _file_system(wire.url)
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(_DEPTH)]
        self._writing: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(_DEPTH, thread_name_prefix="mbridge-files")
        self._sent, self._timeout = 0, timeout

    def place(self, worker: int, index: int, part: Part) -> Tensor:
        while len(self._writing) >= _DEPTH:
            self._writing.popleft().result(self._timeout.seconds)
        return self._buffers[self._sent % _DEPTH][: part.nbytes]

    def send(self, worker: int, index: int, part: Part) -> None:
        data = self._buffers[self._sent % _DEPTH][: part.nbytes]
        self._writing.append(self._pool.submit(self._write, f"{self._root}/{_name(worker, index, part)}", data))
        self._sent += 1

    def finish(self) -> None:
        while self._writing:
            self._writing.popleft().result(self._timeout.seconds)

    def fail(self) -> None:
        """Does nothing: the readers notice at their time-out."""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, path: str, data: Tensor) -> None:
        if _is_local(self._files):
            write_new_file(Path(path), memoryview(data.numpy()))
            return
        with self._files.open(path, "wb") as file:
            file.write(memoryview(data.numpy()))


class FilesInlet:
    """Reads the next bucket while the worker uses the current one."""

    def __init__(self, wire: FilesWire, route: WorkerRoute, timeout: Timeout) -> None:
        self._files, self._root = _file_system(wire.url)
        self._route, self._timeout = route, timeout
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mbridge-files")
        self._ahead: dict[int, Future[list[Tensor]]] = {}

    def take(self, index: int) -> Sequence[Tensor]:
        reading = self._ahead.pop(index, None) or self._pool.submit(self._read, index)
        if index + 1 < len(self._route.buckets):
            self._ahead[index + 1] = self._pool.submit(self._read, index + 1)
        return reading.result()

    def give_back(self, index: int) -> None:
        """Does nothing: each bucket has memory of its own."""

    def fail(self) -> None:
        """Does nothing: no writer waits for a reader."""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, index: int) -> list[Tensor]:
        parts = []
        for part in self._route.buckets[index].parts:
            path = f"{self._root}/{_name(self._route.rank, index, part)}"
            self._timeout.wait_for(
                lambda path=path, part=part: self._size(path) == part.nbytes,
                f"trainer rank {part.source_rank} did not write {path}",
            )
            parts.append(torch.frombuffer(bytearray(self._files.cat_file(path)), dtype=torch.uint8))
        return parts

    def _size(self, path: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            self._files.invalidate_cache()
            return int(self._files.size(path))
        return -1


class FilesTransport:
    """The trainer's end: a folder per version, which is removed when the next version but one begins."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._folders: list[str] = []

    def open(self, version: int, route: Route) -> tuple[FilesWire, Outlet]:
        """Makes the folder of the version. All ranks call it together."""
        context = self._context
        url = context.from_first_rank(f"{context.url}/{version}-{secrets.token_hex(16)}")
        self._folders.append(url)

        def make() -> None:
            while len(self._folders) > 2:
                self._remove(self._folders[0])
                del self._folders[0]
            _make_folder(*_file_system(url))

        context.group.first_rank_does(make)
        largest = max((part.nbytes for _, _, part in context.route.parts_of(context.group.rank)), default=0)
        wire = FilesWire(url=url)
        return wire, FilesOutlet(wire, largest, context.timeout)

    def verify(self, with_digests: bool) -> None:
        """Does nothing: the workers verify."""

    def commit(self, version: int, digest: str | None, proofs: Sequence[str]) -> None:
        """Does nothing: the workers commit."""

    def abort(self) -> None:
        """Does nothing: the next version gets another folder."""

    def close(self) -> None:
        if self._context.group.rank == 0:
            for url in self._folders:
                self._remove(url)
        self._folders = []

    def _remove(self, url: str) -> None:
        files, root = _file_system(url)
        with contextlib.suppress(FileNotFoundError):
            files.rm(root, recursive=True)
