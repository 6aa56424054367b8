"""The config of Llama-Nemotron (DeciLM): Transformers has none, the models' repositories bring code of their own instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig


class Attributes(dict[str, Any]):
    """A JSON object whose fields are attributes too, as in the repositories' own class."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class NemotronNasConfig(LlamaConfig):
    """A Llama config whose `block_configs` say of each layer what attention and MLP (`ffn`) it has. Sizes that differ between
    layers are null in config.json, and Llama's defaults here, which mean nothing."""

    model_type = "nemotron-nas"

    block_configs: list[dict[str, Any]] | None = None

    def __init__(self, block_configs: list[Mapping[str, Any]] | None = None, **fields: Any) -> None:
        super().__init__(**{name: value for name, value in fields.items() if value is not None})
        self.block_configs = [
            Attributes({part: Attributes(config) if isinstance(config, Mapping) else config for part, config in block.items()})
            for block in block_configs or []
        ]
