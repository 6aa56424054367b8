"""The config class of Llama-Nemotron (DeciLM). Transformers has none; the models' repositories contain their own code
instead."""

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
    """A Llama config whose `block_configs` describe the attention and the MLP (`ffn`) of each layer. Sizes that differ between
    layers are null in config.json; here they have Llama's defaults, which must not be used."""

    model_type = "nemotron-nas"

    block_configs: list[dict[str, Any]] | None = None

    def __init__(self, block_configs: list[Mapping[str, Any]] | None = None, **fields: Any) -> None:
        super().__init__(**{name: value for name, value in fields.items() if value is not None})
        self.block_configs = [
            Attributes({part: Attributes(config) if isinstance(config, Mapping) else config for part, config in block.items()})
            for block in block_configs or []
        ]
