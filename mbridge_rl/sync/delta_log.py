"""A log of deltas in a directory or an object store, by fsspec: for engines that no network joins to the trainer, that come
late, or that come back.

Every source rank writes its messages into the version's folder; when all have, one of them seals it with a marker, which is one
small object and the commit: what has no marker does not exist. A receiver walks from the newest marker back to the version that
it holds, or to a full sync, and applies what lies between.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from mbridge_rl.sync.delta import DeltaReceiver
from mbridge_rl.sync.errors import SyncError


@dataclass(frozen=True)
class Marker:
    """A sealed version: what it starts from (`None` for a full sync), and the bytes of all its messages."""

    version: int
    base: int | None
    nbytes: int


class DeltaLog:
    """The log at `url`: a path, or what fsspec understands (`s3://...`, `memory://...`)."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._files, self._root = fsspec.core.url_to_fs(url)
        self._root = self._root.rstrip("/")

    def write(self, version: int, source_rank: int, messages: Mapping[int, bytes]) -> None:
        """One source rank's messages (`DeltaSender.encode`)."""
        self._files.makedirs(self._folder(version), exist_ok=True)
        for target_rank, message in messages.items():
            self._files.pipe_file(f"{self._folder(version)}/{source_rank}-{target_rank}.delta", message)

    def seal(self, version: int, base: int | None) -> Marker:
        """All source ranks have written: from here on receivers see the version. Called once, behind a barrier; each sender
        commits after it."""
        marker = Marker(version, base, self._files.du(self._folder(version)))
        unnamed = f"{self._root}/{secrets.token_hex(8)}.partial"
        self._files.pipe_file(unnamed, json.dumps(asdict(marker)).encode())
        self._files.mv(unnamed, f"{self._root}/{version}.json")
        return marker

    def markers(self) -> dict[int, Marker]:
        """The sealed versions."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return {}
        paths = (path for path in self._files.ls(self._root, detail=False) if path.endswith(".json"))
        found = (Marker(**json.loads(self._files.cat_file(path))) for path in paths)
        return {marker.version: marker for marker in sorted(found, key=lambda marker: marker.version)}

    def path_to(self, version: int, held: int | None) -> list[Marker]:
        """What leads from the version `held` to `version`, in order.

        Raises:
            SyncError: nothing does: the log lacks a version, or the full sync before it.
        """
        markers, path, wanted = self.markers(), [], version
        while wanted != held:
            if wanted not in markers:
                raise SyncError(
                    f"the delta log {self._root} leads from version {held} to {version} only through version {wanted}, which "
                    f"it lacks: write a full sync (encode(full=True))"
                )
            path.insert(0, markers[wanted])
            if markers[wanted].base is None:
                break
            wanted = markers[wanted].base
        return path

    def catch_up(self, receiver: DeltaReceiver, tensors: Mapping[str, Tensor]) -> int | None:
        """Brings `tensors` to the newest version; returns it, `None` if the log is empty.

        Raises:
            SyncError: see `path_to`; DeltaRefused: a message is damaged, or `tensors` are not what `receiver` applied last. The
                versions before it were applied.
        """
        newest = max(self.markers(), default=None)
        for marker in self.path_to(newest, receiver.version) if newest is not None else ():
            suffix = f"-{receiver.rank}.delta"
            paths = [path for path in self._files.ls(self._folder(marker.version), detail=False) if path.endswith(suffix)]
            receiver.apply([self._files.cat_file(path) for path in sorted(paths)], tensors)
        return newest

    def forget_before(self, version: int) -> None:
        """Removes what is older than `version`, from which newcomers can start if it is a full sync."""
        for older in [marker for marker in self.markers() if marker < version]:
            self._files.rm(f"{self._root}/{older}.json")  # first: a version without its messages must not be seen
            self._files.rm(self._folder(older), recursive=True)

    def _folder(self, version: int) -> str:
        return f"{self._root}/{version}"
