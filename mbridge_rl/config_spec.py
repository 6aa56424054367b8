"""From the contents of a config.json to what both ends know of the model: the one way on which every field is checked."""

from __future__ import annotations

from typing import Any

from mbridge_rl.bridges import model_spec
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.hf.config import parse_config


def spec_of_config(values: Any, *, mtp: bool = False) -> ModelSpec:
    """The spec of the model that the contents of a config.json describe. No code of a checkpoint is run, no weight is read.

    Args:
        values: the parsed JSON, whatever it is.
        mtp: with multi-token-prediction layers, as in `AutoBridge.from_pretrained`.

    Raises:
        CheckpointError: it is no config of a model: a field's name, what it holds and what is expected.
        UnsupportedModelError: no bridge for the model, or for what one of its fields asks for, by its name.
    """
    return model_spec(parse_config(values), mtp=mtp)
