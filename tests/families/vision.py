"""Language towers in Megatron, vision towers carried along."""

from families.family import Family

FAMILIES: list[Family] = []
