"""Errors that users of the library catch. Each message names what was wrong, where, and what to do."""

_MOST_CHARACTERS = 12_000


class BridgeError(Exception):
    """Base class of every error this library raises on purpose.

    A message quotes names and values that others wrote, of any length. One of more than 12,000 characters is cut in the middle.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(_cut(one) if isinstance(one, str) else one for one in arguments))


def _cut(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"


class LayoutError(BridgeError, ValueError):
    """A parallel layout that the model (or Megatron itself) does not admit."""


class UnsupportedModelError(BridgeError, ValueError):
    """An architecture, or a feature of a supported one, that no bridge can express."""


class StateMismatchError(BridgeError, ValueError):
    """Tensors that are missing, unexpected, or of another shape or dtype than the mapping says."""


class CheckpointError(BridgeError, ValueError):
    """A checkpoint directory or file that cannot be read as what it claims to be."""


class PlanError(BridgeError, ValueError):
    """Two sides that no plan connects: a region that a target needs and no source holds."""


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


def listed(names: object, limit: int = 8) -> str:
    """`names` as one readable line: sorted, at most `limit` of them, then how many more."""
    ordered = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown}, ... and {len(ordered) - limit} more"
