"""Linear attention and Mamba beside attention."""

from families.family import Family

FAMILIES: list[Family] = []
