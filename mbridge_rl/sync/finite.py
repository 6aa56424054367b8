"""NaN and infinity in a policy."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from mbridge_rl.core.errors import listed
from mbridge_rl.core.finite import is_finite
from mbridge_rl.sync.errors import NonFiniteWeights


def require_finite(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Raises NonFiniteWeights, naming the parameters that hold NaN or infinity."""
    refuse_strange([name for name, tensor in tensors.items() if not is_finite(tensor)], rank)


def refuse_strange(names: Collection[str], rank: int) -> None:
    """Raises NonFiniteWeights if there are any names."""
    if names:
        raise NonFiniteWeights(
            f"rank {rank}: {len(names)} parameters hold NaN or infinity: {listed(sorted(names))}. Nothing was committed, the "
            "engines serve the old version; WeightSync(nonfinite='pass') sends them all the same"
        )
