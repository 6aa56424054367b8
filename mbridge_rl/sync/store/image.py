"""One worker's image in a file: a label that names the fill of the bytes, and the bytes.

A file is filled again and again. Each fill has a random nonce, which is written to the label before the first byte of the fill.
So if the label has the same nonce before and after a reader has read the bytes, all of them belong to that fill.
"""

from __future__ import annotations

import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

from mbridge_rl.core.errors import StoreError
from mbridge_rl.distributed.arena import Arena

LABEL_BYTES = 4096  # a page, so that the bytes behind it are aligned to pages
_LABEL = struct.Struct("<8s16sQQ")
_MAGIC = b"MBRLIMG2"


def new_fill() -> str:
    """A new unique name of a fill: 128 random bits, as 32 hex digits."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Label:
    """The label at the front of an image's file.

    Attributes:
        fill: nonce of the fill, as `new_fill` makes it.
        worker: rank of the engine worker.
        nbytes: bytes of the image.
    """

    fill: str
    worker: int
    nbytes: int

    @classmethod
    def read(cls, path: str | Path, descriptor: int) -> Label:
        """Reads the label of an open file.

        Raises:
            StoreError: the file has no label.
        """
        return cls._from(path, os.pread(descriptor, _LABEL.size, 0))

    @classmethod
    def of(cls, arena: Arena) -> Label:
        """Reads the label of a mapped image; raises as `read` does."""
        return cls._from(arena.path, arena.front()[: _LABEL.size])

    @classmethod
    def _from(cls, path: str | Path, content: bytes) -> Label:
        if len(content) < _LABEL.size or content[: len(_MAGIC)] != _MAGIC:
            raise StoreError(
                f"{path} has no label of an image: it was written by another version of mbridge_rl; remove the store"
            )
        _, fill, worker, nbytes = _LABEL.unpack(content)
        return cls(fill.hex(), worker, nbytes)

    def write(self, descriptor: int) -> None:
        """Writes the label; to be called before the first byte of the fill is written."""
        os.pwrite(descriptor, _LABEL.pack(_MAGIC, bytes.fromhex(self.fill), self.worker, self.nbytes), 0)


def map_image(path: str | Path, nbytes: int, *, writable: bool, descriptor: int | None = None) -> Arena:
    """Maps the image of a file, without its label."""
    return Arena(Path(path), nbytes, writable=writable, start=LABEL_BYTES, descriptor=descriptor)
