"""Which releases of Megatron-core are known to work, and what happens with another."""

from __future__ import annotations

import re
import warnings
from functools import cache

OLDEST = (0, 16, 1)
NEWEST_TESTED = (0, 19)

_TOO_OLD = "its layer specs, pipeline layouts and optimizers have other interfaces than the ones that mbridge_rl uses"


def check_running_release() -> None:
    """`check_release` of the Megatron-core that this process imports; on a machine without CUDA inside of `megatron_runtime`.

    Raises:
        ImportError: it is too old, or is not installed.
    """
    import megatron.core

    check_release(megatron.core.__version__)


def check_release(version: str) -> None:
    """Refuses a release that is known not to work, and warns of a newer one than those that are tested: it may work.

    Args:
        version: `megatron.core.__version__`, such as "0.19.2" or "0.20.0rc0.dev1".

    Raises:
        ImportError: the release is older than 0.16.1.
    """
    number = _number(version)
    if number < OLDEST:
        raise ImportError(
            f"megatron-core {version} is too old for mbridge_rl: {_TOO_OLD}. Install megatron-core>={_text(OLDEST)}"
        )
    if number[: len(NEWEST_TESTED)] > NEWEST_TESTED:
        _warn(version)


@cache
def _warn(version: str) -> None:
    """Warns once in a process."""
    warnings.warn(
        f"megatron-core {version} is newer than the releases that mbridge_rl is tested with ({_text(OLDEST)} to "
        f"{_text(NEWEST_TESTED)}); it goes on, and refuses a model whose parameters it does not find",
        UserWarning,
        stacklevel=2,
    )


def _number(version: str) -> tuple[int, ...]:
    """The first three numbers of a version. A pre-release counts as its release: 0.20.0rc0 has what 0.20.0 will have."""
    numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    if numbers is None:
        raise ImportError(f"megatron.core.__version__ is {version!r}; expected a version such as '{_text(OLDEST)}'")
    return tuple(int(number or 0) for number in numbers.groups())


def _text(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))
