"""Makes a model's spec from the contents of a config.json, and checks every field of them."""

from __future__ import annotations

from typing import Any

from mbridge_rl.bridges import model_spec
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.hf.config import parse_config


def spec_of_config(values: Any, *, mtp: bool = False) -> ModelSpec:
    """The spec of the model that the contents of a config.json describe. No code of a checkpoint is run, and no weight is read.

    Args:
        values: the parsed JSON; it may be anything.
        mtp: include multi-token-prediction layers, as in `AutoBridge.from_pretrained`.

    Raises:
        CheckpointError: it is not the config of a model; names a field, its value and what is expected.
        UnsupportedModelError: there is no bridge for the model, or for the feature that a field, which is named, asks for.
    """
    return model_spec(parse_config(values), mtp=mtp)
