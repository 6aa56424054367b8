"""A sample of the runs of `chaos.py`; `python tests/chaos.py 200` runs them all."""

from __future__ import annotations

import pytest
from chaos import FAULTS, WAYS, Case, run


@pytest.mark.slow
@pytest.mark.parametrize("index", range(10))
def test_whatever_is_hit_no_mixture_is_served(index: int) -> None:
    run(
        Case(*WAYS[index % len(WAYS)], FAULTS[index % len(FAULTS)], moment=0.07 + index * 0.09, delta=index % 3 > 0, seed=index)
    )
