"""Configs of well-known public models, by name, so that refits can be planned without a checkpoint."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from mbridge_rl.hf.config import parse_config

_FOLDER = files("mbridge_rl.bridges") / "configs"


def bundled_names() -> list[str]:
    return sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))


def bundled_config(name: str) -> Any:
    """The Transformers config of a bundled model. Raises KeyError for a name that is not in `bundled_names`."""
    if name not in bundled_names():
        raise KeyError(name)
    return parse_config(json.loads((_FOLDER / f"{name}.json").read_text()))
