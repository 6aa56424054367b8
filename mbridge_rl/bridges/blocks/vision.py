"""Vision-language models: the language model in Megatron, all that makes features of pixels carried along as Transformers built
it, frozen. Training sees text alone: a forward pass refuses pixels and tokens that stand for them."""

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
        build: makes it from the Transformers config; on the meta device when only shapes are asked for.
        hf_name: how its tensors' names begin in a checkpoint.
    """

    build: Callable[[Any], nn.Module]
    hf_name: str


def with_vision(
    hf: ConfigReader, family: Callable[[ConfigReader], ModelSpec], prefixes: Mapping[str, str], towers: Mapping[str, Tower]
) -> ModelSpec:
    """The spec of a vision-language model.

    Args:
        family: of the language model, which `hf.text_config` describes.
        prefixes: beginnings of the language model's names on its own, and in these checkpoints.
        towers: by their name in the Megatron model.
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
    """Refuses what stands for pixels in these models' tokens."""
    fields = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    return TextOnly(tuple(sorted({token for name in fields if (token := hf.undeclared(name)) is not None})))


def language_config(hf: ConfigReader) -> ConfigReader:
    """The language model's config as if it stood alone. Whether its embeddings are tied is said by the outer config, as
    Transformers reads it: `text_config` need not have the field, and what it says has no effect."""
    return hf.nested("text_config").with_values(tie_word_embeddings=hf.undeclared("tie_word_embeddings", False))


@dataclass(frozen=True)
class _Build:
    config: Any
    tower: Tower

    def __call__(self) -> nn.Module:
        return self.tower.build(self.config)


def _tower_rules(config: Any, name: str, tower: Tower) -> list[Rule]:
    """One per tensor that a checkpoint holds."""
    try:
        with torch.device("meta"):
            tensors = tower.build(config).state_dict(keep_vars=True)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of foreign code
        raise CheckpointError(
            f"{tower.hf_name}: Transformers cannot build it from the config's vision_config: {error!r}"
        ) from error
    return [
        replicated(f"{name}.{tensor}", f"{tower.hf_name}.{tensor}", tuple(values.shape), placement="first_stage")
        for tensor, values in tensors.items()
    ]
