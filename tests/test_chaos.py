"""A sample of the runs of `chaos.py`; `python tests/chaos.py 200` runs them all."""

from __future__ import annotations

import pytest
from chaos import run
from chaos_trainer import FAULTS, WAYS, Case


@pytest.mark.slow
@pytest.mark.parametrize("index", range(10))
def test_whatever_is_hit_no_mixture_is_served(index: int) -> None:
    way, fault = WAYS[index % len(WAYS)], FAULTS[index % len(FAULTS)]
    run(Case(*way, fault, 0.07 + index * 0.09, delta=index % 3 > 0, seed=index, engines=1 + index % 2, copied=index > 5))
