"""Which releases of another package this library works with: the oldest that can work, and the newest that is tested."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Releases:
    """The supported releases of one package.

    Attributes:
        package: its name for pip.
        oldest: the first release that works, as numbers.
        newest_tested: the beginning of the newest tested releases' numbers: (0, 19) includes 0.19.2.
        reason: why an older release does not work.
    """

    package: str
    oldest: tuple[int, ...]
    newest_tested: tuple[int, ...]
    reason: str

    def check(self, version: str) -> None:
        """Refuses a release that is known not to work, and warns once in a process of one that is newer than the tested ones.

        Args:
            version: the installed release, such as "0.19.2" or "0.20.0rc0.dev1".

        Raises:
            ImportError: the release is too old, or the version cannot be read.
        """
        number = self.number(version)
        if number < self.oldest:
            raise ImportError(
                f"{self.package} {version} is too old for mbridge_rl: {self.reason}. "
                f"Install {self.package}>={_text(self.oldest)}"
            )
        if not self.is_tested(version):
            _warn(
                f"{self.package} {version} is newer than the releases that mbridge_rl is tested with "
                f"({_text(self.oldest)} to {_text(self.newest_tested)}). It is used nevertheless; if something fails, install "
                "a tested release"
            )

    def is_tested(self, version: str) -> bool:
        """Whether the release is among those that are tested."""
        number = self.number(version)
        return self.oldest <= number and number[: len(self.newest_tested)] <= self.newest_tested

    def number(self, version: str) -> tuple[int, ...]:
        """The first three numbers of a version. A pre-release counts as its release: 0.20.0rc0 has what 0.20.0 will have."""
        numbers = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
        if numbers is None:
            raise ImportError(f"{self.package} says that its version is {version!r}; expected one such as {_text(self.oldest)}")
        return tuple(int(number or 0) for number in numbers.groups())


@cache
def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _text(number: tuple[int, ...]) -> str:
    return ".".join(map(str, number))
