"""How older releases of Transformers spell what families read from a config.

Families are written for the newest release. Two tables translate the others: values that a class spelled differently, and
fields that a class did not have because its model used a constant. `mbridge_rl.hf.versions` has the other differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Values that a class spelled differently, by config class and field.
_SPELLINGS: Mapping[tuple[str, str], Mapping[str, str]] = {
    # Before 5.13 Nemotron-H had names of its own for kinds of layers that other families have, too.
    ("NemotronHConfig", "layers_block_type"): {"mamba": "linear_attention", "attention": "full_attention"},
}

# Constants of a model whose class has no field for them, by config class and field.
_CONSTANTS: Mapping[tuple[str, str], Any] = {
    # Fields since 5.19.
    ("GptOssConfig", "swiglu_alpha"): 1.702,
    ("GptOssConfig", "swiglu_limit"): 7.0,
}

# How Nemotron-H's embedding begins in checkpoints that Transformers saved before 5.16.
EMBEDDING_OF_OLDER_RELEASES = "backbone.embedding."


def newest_spelling(config_class: str, name: str, value: Any) -> Any:
    """The value of a field as the newest release spells it."""
    spellings = _SPELLINGS.get((config_class, name))
    if spellings is None or not isinstance(value, list | tuple):
        return value
    return [spellings.get(item, item) if isinstance(item, str) else item for item in value]


def has_constant(config_class: str, name: str) -> bool:
    """Whether the model of a class without this field uses a constant in its place."""
    return (config_class, name) in _CONSTANTS


def constant(config_class: str, name: str) -> Any:
    """The constant that the model of a class without this field uses in its place."""
    return _CONSTANTS[config_class, name]
