"""Vision-language models: the language model is Megatron's; the modules that compute features from pixels are Transformers'
own, carried along and frozen. Training is on text alone: a forward pass refuses pixels and placeholder tokens for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.extras import TextOnly
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Rule, replicated


@dataclass(frozen=True)
class Tower:
    """A module of Transformers' model, by its path there.

    Attributes:
        build: makes the module from the Transformers config; called under the meta device if only shapes are needed.
        hf_name: the prefix of its tensors' names in a checkpoint.
    """

    build: Callable[[Any], nn.Module]
    hf_name: str


def with_vision(
    hf: ConfigReader, family: Callable[[ConfigReader], ModelSpec], prefixes: Mapping[str, str], towers: Mapping[str, Tower]
) -> ModelSpec:
    """The spec of a vision-language model.

    Args:
        family: the family of the language model, which `hf.text_config` describes.
        prefixes: prefixes of the names in the language model's own checkpoints, with those in these checkpoints.
        towers: the towers, by their names in the Megatron model.
    """
    hf.ignore("vision_config", "vision_start_token_id", "vision_end_token_id")  # the towers' own code reads vision_config
    rules = tuple(rule for name, tower in towers.items() for rule in _tower_rules(hf.config, name, tower))
    carried = {name: _Build(hf.config, tower) for name, tower in towers.items()}

    def with_towers(spec: ModelSpec) -> ModelSpec:
        spec = spec.renamed(prefixes)
        alternatives = tuple(with_towers(other) for other in spec.alternatives)
        extras = (*spec.extras, text_only(hf))
        return replace(spec, rules=(*rules, *spec.rules), carried=carried, extras=extras, alternatives=alternatives)

    return with_towers(family(language_config(hf)))


def text_only(hf: ConfigReader) -> TextOnly:
    """The extra that refuses placeholder tokens for pixels."""
    fields = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    return TextOnly(tuple(sorted({token for name in fields if (token := hf.undeclared(name)) is not None})))


def language_config(hf: ConfigReader) -> ConfigReader:
    """The config of the language model on its own. The outer config determines whether its embeddings are tied, as in
    Transformers: `text_config` need not have the field, and its value there has no effect."""
    return hf.nested("text_config").with_values(tie_word_embeddings=hf.undeclared("tie_word_embeddings", False))


@dataclass(frozen=True)
class _Build:
    config: Any
    tower: Tower

    def __call__(self) -> nn.Module:
        return self.tower.build(self.config)


def _tower_rules(config: Any, name: str, tower: Tower) -> list[Rule]:
    """The rules of a tower, one for each of its tensors in a checkpoint."""
    try:
        with torch.device("meta"):
            tensors = tower.build(config).state_dict(keep_vars=True)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # foreign code
        raise CheckpointError(
            f"{tower.hf_name}: Transformers cannot build it from the config's vision_config: {error!r}"
        ) from error
    return [
        replicated(f"{name}.{tensor}", f"{tower.hf_name}.{tensor}", tuple(values.shape), placement="first_stage")
        for tensor, values in tensors.items()
    ]
