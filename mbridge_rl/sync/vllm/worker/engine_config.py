"""The model from which a running engine was started: its config.json with the engine's own overrides, and whether it is tied.

vLLM changes its config while it loads a model: it clears `tie_word_embeddings` if the checkpoint holds an output layer (and
ties the layers again if they turn out to be equal), renames rotary scalings and removes windows. So that config does not
describe the model from which the engine was started.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.hf.config import load_config

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def config_as_given(model_config: ModelConfig) -> Any:
    """The Transformers config with which an engine was started; vLLM's own, changed config if there is no config.json."""
    directory = _directory(model_config)
    if directory is None:
        return model_config.hf_config
    try:
        config = load_config(directory)
    except CheckpointError:  # vLLM knows model types that Transformers doesn't
        return model_config.hf_config
    overrides = model_config.hf_overrides
    if callable(overrides):
        return overrides(config)
    _override(config, overrides)
    return config


def is_tied(model: nn.Module) -> bool | None:
    """Whether the output layer of a worker's model is its embedding; `None` if the worker has no output layer by name."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    embeddings = {layer.weight.data_ptr() for layer in layers if not isinstance(layer, ParallelLMHead)}
    heads = [layer.weight.data_ptr() for layer in layers if isinstance(layer, ParallelLMHead)]
    if heads:
        return all(head in embeddings for head in heads)
    named = any(isinstance(getattr(module, "lm_head", None), VocabParallelEmbedding) for module in model.modules())
    return True if named else None


def _directory(model_config: ModelConfig) -> Path | None:
    """The directory of the engine's config.json; for a model of the hub it is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    name = str(model_config.hf_config_path or model_config.model)
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).exists() or name.count("/") > 1:
        return None
    cached = try_to_load_from_cache(name, "config.json", revision=model_config.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _override(config: Any, overrides: Mapping[str, Any]) -> None:
    """Applies overrides in the way in which vLLM applies `hf_overrides`."""
    from transformers import PreTrainedConfig

    for name, value in overrides.items():
        part = getattr(config, name, None)
        if isinstance(value, Mapping) and isinstance(part, PreTrainedConfig):
            _override(part, value)
        else:
            setattr(config, name, value)
