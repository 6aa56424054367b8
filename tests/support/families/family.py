"""What a test needs to know of one family, and tiny random checkpoints of it by Transformers' own class."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import forward
from torch import Tensor, nn

from mbridge_rl.core.layout import ParallelLayout

VOCABULARY = 515  # odd: Megatron and vLLM both pad it

# Sizes that do not divide nicely, and that vLLM computes on a CPU: heads of 32 or more, experts of multiples of 32.
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


# How Transformers' models are loaded: its other attentions leave out what it passes them, such as Gemma 2's cap of scores.
REFERENCE: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}


@dataclass(frozen=True)
class Family:
    """One tiny model of a family.

    Attributes:
        title: the family's row in docs/models.md; several variants (tied, with biases, ...) may share it.
        variant: this model's name in test ids.
        model_type: Transformers' name of the config class.
        architecture: Transformers' model class, and what config.json says.
        config: fields of the config beside `base`'s.
        base: fields that many families share.
        layout: real processes for `test_sharded`: TP x PP x EP or the nearest that the model admits.
        engine: further options of vLLM's engine; a string says why vLLM cannot run the family on this CPU.
        lora: targets of adapters (Megatron linears); a string says why there are none.
        tolerance: largest difference of fp32 logits from Transformers', relative to the largest logit; more needs a comment.
        ignored: beginnings of names in the checkpoint that the bridge leaves alone.
        embedding: standard deviation of token embeddings; models that scale them need less, or they repeat themselves.
        classes: of the config and the model, where Transformers has none.
        files: further files of a checkpoint.
        since: the first release of Transformers that has this model; with an older one its tests are skipped.
        right_since: the first release whose own model computes what the later ones do.
    """

    title: str
    variant: str
    model_type: str
    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=lambda: DENSE)
    layout: ParallelLayout = ParallelLayout(tp=2, pp=2, stage_layers=(2, 1))  # noqa: RUF009 (immutable)
    engine: Mapping[str, Any] | str = field(default_factory=dict)
    lora: tuple[str, ...] | str = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    tolerance: float = forward(layers=4, width=256)
    ignored: tuple[str, ...] = ()
    embedding: float = 0.5
    classes: tuple[type[Any], type[nn.Module]] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    since: tuple[int, int] = (5, 9)
    right_since: tuple[int, int] = (5, 9)

    def skip_if_transformers_is_wrong(self) -> None:
        if _transformers() < self.right_since:
            pytest.skip(f"Transformers before {self.right_since} computes {self.variant} otherwise than later releases")

    def hf_config(self) -> Any:
        from transformers import CONFIG_MAPPING

        if _transformers() < self.since:
            pytest.skip(f"Transformers {_transformers()} does not have {self.variant}, which came with {self.since}")
        config_class = self.classes[0] if self.classes else CONFIG_MAPPING[self.model_type]
        fields = copy.deepcopy({**self.base, **self.config})  # the class writes into dictionaries
        config = config_class(**_spelled_for(config_class, fields))
        config.architectures = [self.architecture]
        return config

    def model(self, seed: int = 0) -> nn.Module:
        """A Transformers model in fp32, random in every tensor: norms, biases and buffers that decide routing included."""
        import transformers

        config = self.hf_config()
        model_class = self.classes[1] if self.classes else getattr(transformers, self.architecture)
        model = model_class._from_config(config, **REFERENCE).eval()
        randomize(model, seed, self.embedding)
        return model

    def checkpoint(self, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Saves the model of `seed` to `directory`, and returns it."""
        model = self.model(seed).to(dtype)
        model.save_pretrained(directory)
        for name, text in self.files.items():
            (directory / name).write_text(text)
        return model


def _transformers() -> tuple[int, ...]:
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2]))


def _spelled_for(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with kinds of layers as the installed release spells them; Nemotron-H's were others before 5.13."""
    if "layers_block_type" in fields and "mamba" in config_class().layers_block_type:
        spellings = {"linear_attention": "mamba", "full_attention": "attention"}
        fields["layers_block_type"] = [spellings.get(kind, kind) for kind in fields["layers_block_type"]]
    return fields


def randomize(model: nn.Module, seed: int, embedding: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        saved = model.state_dict().keys()  # buffers that are not are constants, such as rotary frequencies
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_floating_point() and name in saved:
                tensor.copy_(_random(name, tensor, generator, embedding))


def _random(name: str, tensor: Tensor, generator: torch.Generator, embedding: float) -> Tensor:
    """Logits of order 1 that depend on every tensor; norms around their neutral value, whichever that is."""
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() < 2:
        neutral = tensor.float().mean().round() if "norm" in name else 0.0
        return neutral + 0.2 * noise
    return noise * (embedding if "embed" in name else 0.8 * tensor.shape[-1] ** -0.5)
