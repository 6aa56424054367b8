"""One entry per model family: what `tests/bridges/test_families.py` builds, converts, runs and refits. Adding a family adds an
entry.

The module an entry stands in says what the family is made of: dense.py, experts.py, hybrid.py, vision.py.
"""

from families import dense, experts, hybrid, vision
from families.family import Family

FAMILIES: dict[str, Family] = {
    family.variant: family for module in (dense, experts, hybrid, vision) for family in module.FAMILIES
}
