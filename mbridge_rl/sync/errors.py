"""Errors of a weight sync. None of them is raised half-way without saying which version was lost."""

from __future__ import annotations

from mbridge_rl.core.errors import BridgeError


class SyncError(BridgeError, RuntimeError):
    """Base class of errors that a weight sync raises on purpose."""


class RanksUnreachable(SyncError):
    """Other ranks are missing or died: the process group is of no more use."""


class EngineMismatch(SyncError):
    """The engine's model is not the one the trainer describes: config, names, shapes or dtypes differ."""


class IncompleteSync(SyncError):
    """A sync was committed before every announced tensor had arrived."""


class DigestMismatch(SyncError):
    """Weights that arrived, or that the engine now holds, are not bit for bit the trainer's."""


class EngineUnusable(SyncError):
    """The engine holds weights of no version; it refuses to generate until the next complete sync."""


class EngineProcessError(SyncError):
    """An engine in another process failed, died, or did not answer in time."""


class ArenaError(SyncError):
    """Shared memory that cannot be created, mapped, or does not hold what is asked of it."""


class StoreError(SyncError):
    """A weight store that does not hold what is asked of it."""


class TransferTimeout(SyncError):
    """The other end of a transfer did not come within the time-out."""


class PeerFailed(SyncError):
    """Another end of a transfer failed or left, and has the reason; or it died."""


class NonFiniteWeights(SyncError):
    """The policy holds NaN or infinite weights; nothing was sent."""


class DeltaRefused(SyncError):
    """A delta that does not follow on what its receiver holds, or that is damaged; nothing was changed."""
