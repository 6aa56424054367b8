"""Reward functions that recipes of tests name."""

from __future__ import annotations

from typing import Any


def length(problem: Any, completion: str) -> float:
    return float(len(completion))
