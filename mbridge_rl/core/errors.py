"""Errors that users of the library catch. Each message names what was wrong, where, and what to do."""


class BridgeError(Exception):
    """Base class of every error this library raises on purpose."""


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


def listed(names: object, limit: int = 8) -> str:
    """`names` as one readable line: sorted, at most `limit` of them, then how many more."""
    ordered = sorted(str(name) for name in names)  # type: ignore[attr-defined]
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown}, ... and {len(ordered) - limit} more"
