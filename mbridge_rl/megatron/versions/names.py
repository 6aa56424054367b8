"""Parameters and modules that Megatron renamed since release 0.16, whose names this library uses everywhere.

The table serves both directions: `canonical_name` translates names of a live model to those of 0.16 when its parameters are
listed, and `native_name` translates back.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Renaming:
    """One renamed piece of a name.

    Attributes:
        release: the release that has the new name first.
        before: a regular expression for what stands before the piece in a global name.
        canonical: the piece in 0.16.
        renamed: the piece since `release`.
        after: a regular expression for what stands behind it.
    """

    release: str
    before: str
    canonical: str
    renamed: str
    after: str

    def replaced(self, name: str, old: str, new: str) -> str:
        return re.sub(rf"(?:(?<=^)|(?<=\.))({self.before}){re.escape(old)}({self.after})", rf"\g<1>{new}\g<2>", name, count=1)


RENAMED = (
    # The layer inside of a multi-token-prediction layer, which may be a Mamba layer since then.
    Renaming("0.17", r"mtp\.layers\.\d+\.", "transformer_layer", "mtp_model_layer", r"(?:\.|$)"),
    # Mamba's convolution, a parameter of the mixer and no longer a module in it. Gated delta nets keep their module.
    Renaming("0.19", r"(?:mixer|mamba)\.", "conv1d.weight", "conv1d_weight", r"$"),
    Renaming("0.19", r"(?:mixer|mamba)\.", "conv1d.bias", "conv1d_bias", r"$"),
)


def canonical_name(name: str) -> str:
    """The name in release 0.16 of a parameter or module, by its name in the release that is running."""
    for renaming in RENAMED:
        name = renaming.replaced(name, renaming.renamed, renaming.canonical)
    return name


def native_name(name: str, existing: Container[str]) -> str:
    """The name in the release that is running, by the name in 0.16.

    Args:
        existing: the names in the live model, which show what the release calls them.
    """
    candidates = [name]
    for renaming in RENAMED:
        candidates += [renaming.replaced(candidate, renaming.canonical, renaming.renamed) for candidate in candidates]
    return next((candidate for candidate in candidates if candidate in existing), name)
