"""The description of one model, made by its family: everything that the library knows about it, without weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn

from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.extras import Extra, NotInVllm
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.rules import HFPart, Instance, Rule, instantiate, renamed, renamed_hf_name

# Heads and groups that are not cut: their numbers must be multiples of the tensor-parallel size.
_HEADS = {
    "num_attention_heads": "attention heads",
    "mamba_num_heads": "Mamba heads",
    "mamba_num_groups": "Mamba groups",
    "linear_num_key_heads": "key heads of linear attention",
    "linear_num_value_heads": "value heads of linear attention",
}


@dataclass(frozen=True, slots=True)
class HFTensor:
    """Name, dtype and shape of one HF tensor; a sync announces them before it sends the tensor."""

    hf_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Size of the last dimension; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ModelSpec:
    """The description of a model that trainer and checkpoint share.

    Attributes:
        architecture: the HF class, such as `Qwen3ForCausalLM`.
        vocab_size: the size of the HF vocabulary, unpadded.
        tied_embeddings: whether the output layer is the embedding, so that the checkpoint holds it once.
        transformer_config: arguments of Megatron's `TransformerConfig`, without parallel sizes and dtypes.
        gpt_model: arguments of Megatron's `GPTModel` (or `MambaModel`), without vocabulary size and stages.
        hybrid_pattern: a letter per layer of Megatron's `MambaModel`: `M` Mamba, `*` attention, `-` MLP, `E` experts; `None`
            for a `GPTModel`.
        rules: the mapping table.
        extras: computations of the model beyond Megatron's config (`core.extras`).
        carried: modules of Transformers that the first stage holds, unsharded and frozen: `{name in the Megatron model:
            function that builds it}`. Their tensors are in `rules` like all others.
        alternatives: the same model for checkpoints that name or stack its tensors differently, likelier ones first.
        prediction: the same model with its multi-token-prediction layers; `None` where it has none, or has them already.
        ignored_hf_prefixes: prefixes of the names of tensors that a checkpoint may hold although the model does not use them
            (layers that only pretraining uses).
        aliases: other names under which a checkpoint may hold a tensor, instead of its own name or in addition to it: `{alias:
            hf_name}`. A tied model's `lm_head.weight` is one (`hf.tied`).
    """

    architecture: str
    num_layers: int
    vocab_size: int
    tied_embeddings: bool
    transformer_config: Mapping[str, Any]
    gpt_model: Mapping[str, Any]
    rules: tuple[Rule, ...]
    num_experts: int | None = None
    hybrid_pattern: str | None = None
    extras: tuple[Extra, ...] = ()
    carried: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)
    alternatives: tuple[ModelSpec, ...] = ()
    prediction: ModelSpec | None = None
    ignored_hf_prefixes: tuple[str, ...] = field(default=())
    aliases: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def instances(self) -> list[Instance]:
        """Every Megatron tensor, with concrete names, in checkpoint order."""
        return instantiate(self.rules, self.num_layers, self.num_experts)

    @cached_property
    def hf_parts(self) -> dict[str, HFPart]:
        """A part of every HF tensor, in checkpoint order: its shape and factored shape, computed from the table."""
        return {
            hf_name: part
            for instance in self.instances
            for hf_name, part in zip(instance.hf_names, instance.rule.parts, strict=True)
        }

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every HF tensor, in checkpoint order."""
        return {hf_name: part.shape for hf_name, part in self.hf_parts.items()}

    @cached_property
    def repeated_hf_names(self) -> frozenset[str]:
        """Names of tensors that repeat others: a checkpoint may lack them, and an import ignores them."""
        return frozenset(name for instance in self.instances if instance.rule.repeats for name in instance.hf_names)

    @cached_property
    def carried_hf_names(self) -> frozenset[str]:
        """Names of the tensors of carried modules: a text-only engine has no place for them."""
        names = tuple(f"{name}." for name in self.carried) or (" ",)
        instances = (instance for instance in self.instances if instance.megatron_name.startswith(names))
        return frozenset(hf_name for instance in instances for hf_name in instance.hf_names)

    @cached_property
    def optional_hf_names(self) -> frozenset[str]:
        """Names of the tensors for which an engine may have no place: those of carried modules, which a text-only engine does
        not build, those that repeat others, and those of multi-token-prediction layers, which an engine leaves out if it does
        not speculate with them."""
        prediction_layers = (instance for instance in self.instances if instance.rule.placement == "prediction_stage")
        prediction_names = {hf_name for instance in prediction_layers for hf_name in instance.hf_names}
        return self.carried_hf_names | self.repeated_hf_names | prediction_names

    def hf_grid(self, hf_name: str) -> tuple[int, ...]:
        """The factored shape in which boxes of `hf_name` are given; its row-major order is the tensor's own."""
        return tuple(axis.extent for axis in self.hf_parts[hf_name].axes)

    def hf_tensors(self, dtype: torch.dtype) -> list[HFTensor]:
        """Every tensor of a checkpoint in `dtype`, in the checkpoint's order."""
        return [HFTensor(hf_name, dtypes, self.hf_shapes[hf_name]) for hf_name, dtypes in self.hf_dtypes(dtype).items()]

    def hf_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of every HF tensor of a checkpoint in `dtype`: the rule's where the table fixes one."""
        return {hf_name: instance.rule.dtype or dtype for instance in self.instances for hf_name in instance.hf_names}

    def renamed(self, prefixes: Mapping[str, str]) -> ModelSpec:
        """The same model for checkpoints with other names (`core.rules.renamed`)."""
        ignored = tuple(renamed_hf_name(prefix, prefixes) for prefix in self.ignored_hf_prefixes)
        aliases = {renamed_hf_name(alias, prefixes): renamed_hf_name(name, prefixes) for alias, name in self.aliases.items()}
        return replace(self, rules=renamed(self.rules, prefixes), ignored_hf_prefixes=ignored, aliases=aliases)

    def for_checkpoint(self, shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
        """The first of this spec and its alternatives whose tensors are all among `shapes` (by `hf_name`); this spec if none
        fits."""
        candidates = (self, *self.alternatives)
        return next((spec for spec in candidates if spec.hf_shapes.items() <= shapes.items()), self)

    @property
    def not_in_vllm(self) -> tuple[NotInVllm, ...]:
        """The extras that this model computes like Transformers, and that vLLM leaves out."""
        return tuple(extra for extra in self.extras if isinstance(extra, NotInVllm))

    def as_in_vllm(self) -> ModelSpec:
        """The same weights, computed as a vLLM engine does."""
        return replace(
            self,
            extras=tuple(extra for extra in self.extras if not isinstance(extra, NotInVllm)),
            alternatives=tuple(spec.as_in_vllm() for spec in self.alternatives),
            prediction=self.prediction.as_in_vllm() if self.prediction is not None else None,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the mapping. It must be equal on both ends of a sync, otherwise nothing is sent."""
        table = [(name, *shape) for name, shape in self.hf_shapes.items()]
        return hashlib.blake2b(json.dumps([self.architecture, table]).encode(), digest_size=8).hexdigest()

    def validate(self, layout: ParallelLayout) -> None:
        """Checks that the layout can divide the model.

        Raises:
            LayoutError: it cannot; the message names the tensor or the axis, and the numbers that do not divide.
        """
        layout.layers_of_stages(self.num_layers)
        placed, present = sum(layout.stage_mtp_layers or ()), self.transformer_config.get("mtp_num_layers") or 0
        if layout.stage_mtp_layers is not None and placed != present:
            raise LayoutError(
                f"the layout places {placed} multi-token prediction layers (m), {self.architecture} has {present}"
            )
        if present and layout.vpp > 1 and layout.mtp_stage % layout.pp == 0:
            raise LayoutError(
                f"pipeline rank 0 would hold the embedding of {self.architecture} twice: place its multi-token prediction "
                f"layers (m) on another pipeline rank, found stage {layout.mtp_stage} of {layout.num_stages}"
            )
        if layout.ep > 1 and not self.num_experts:
            raise LayoutError(f"ep={layout.ep}: {self.architecture} has no experts; use ep=1")
        if (self.num_experts or 0) % layout.ep:
            raise LayoutError(f"{self.num_experts} experts do not divide by ep={layout.ep}; choose a divisor")
        if self.hybrid_pattern and layout.vpp > 1:
            raise LayoutError(f"vpp={layout.vpp}: Megatron's MambaModel has no virtual pipeline stages; use vpp=1")
        if self.num_experts and self.transformer_config.get("add_bias_linear") and layout.expert_tp > 1:
            raise LayoutError(
                f"{self.architecture}: experts with biases cannot be cut, found etp={layout.expert_tp}; use etp=1"
            )
        for heads in _HEADS:
            if (count := self.transformer_config.get(heads) or layout.tp) % layout.tp:
                raise LayoutError(f"{count} {_HEADS[heads]} do not divide by tp={layout.tp}; choose a divisor")
        for rule in self.rules:
            rule.validate(layout)
