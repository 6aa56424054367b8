"""This bridge with the interface of `megatron.bridge.AutoBridge` (0.5), as verl, SkyRL, slime and NeMo-RL use it: change the
import to `from mbridge_rl.integrations.megatron_bridge import AutoBridge`.

Arguments that do not change the result (`show_progress`, `distributed_save`, `strict`) are accepted and have no effect: there
is no progress bar, every rank writes its own bytes, and missing tensors are always an error. Arguments that would change the
result are refused by name: value heads, quantized exports. Adapters are those of `mbridge_rl.training.add_lora`, not of
Megatron-Bridge's PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mbridge_rl import bridge as own
from mbridge_rl.bridges import FAMILIES
from mbridge_rl.core.errors import BridgeError
from mbridge_rl.core.model import HFTensor
from mbridge_rl.integrations.common import HFStream, chunks_of, refuse
from mbridge_rl.integrations.provider import Provider

Model = nn.Module | Sequence[nn.Module]


class HFWeightTuple(NamedTuple):
    """A tensor of an export."""

    param_name: str
    weight: Tensor


class AutoBridge:
    """One model's bridge.

    Attributes:
        hf_config: the Transformers config.
        bridge: the `mbridge_rl.AutoBridge` that does the work.
    """

    def __init__(self, bridge: own.AutoBridge) -> None:
        self.bridge = bridge
        self.hf_config = bridge.hf_config

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> AutoBridge:
        """Makes the bridge of a checkpoint directory, or of a name on the hub. Remote code is never run; the provider
        determines the dtype."""
        refuse("from_hf_pretrained", kwargs, harmless=("dtype", "torch_dtype", "low_cpu_mem_usage"))
        return cls(own.AutoBridge.from_pretrained(path))

    @classmethod
    def from_hf_config(cls, config: Any) -> AutoBridge:
        """Makes the bridge of a Transformers config; loading weights then needs a path."""
        return cls(own.AutoBridge.from_config(config))

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """Whether there is a bridge for the model at `path`."""
        try:
            own.AutoBridge.from_pretrained(path)
        except BridgeError:
            return False
        return True

    @classmethod
    def supports(cls, config: Any) -> bool:
        """Whether there is a bridge for the architecture of a Transformers config."""
        return any(architecture in FAMILIES for architecture in getattr(config, "architectures", None) or ())

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """The architectures, by their names in configs."""
        return list(FAMILIES)

    @property
    def transformer_config(self) -> Any:
        """Megatron's config of the model, not split over ranks."""
        return self.to_megatron_provider(load_weights=False).config()

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None) -> Provider:
        """Makes the provider, which builds the model after its parallel sizes and other fields are set.

        Args:
            load_weights: whether the model is filled when it is built, from `hf_path` or the bridge's own checkpoint.
        """
        provider = Provider(self.bridge.spec)
        if load_weights:
            provider.register_pre_wrap_hook(lambda model: self._loaded(model, hf_path), prepend=True)
        return provider

    def to_megatron_model(self, load_weights: bool = True, hf_path: str | Path | None = None, **kwargs: Any) -> list[nn.Module]:
        """Builds the model for the running parallel state; `Provider.provide_distributed_model` describes `kwargs`."""
        return self.to_megatron_provider(load_weights, hf_path).provide_distributed_model(**kwargs)

    def load_hf_weights(
        self, model: Model, hf_path: str | Path | None = None, allowed_mismatched_params: list[str] | None = None
    ) -> list[nn.Module]:
        """Fills the model and returns its chunks; every rank reads only its own part.

        Raises:
            NotOffered: `allowed_mismatched_params` is given (value heads).
            BridgeError: see `mbridge_rl.AutoBridge.load_weights`.
        """
        refuse("load_hf_weights", {"allowed_mismatched_params": allowed_mismatched_params})
        return self._loaded(chunks_of(model), hf_path)

    def get_conversion_tasks(self, megatron_model: Model, hf_path: str | Path | None = None) -> list[HFTensor]:
        """The HF tensors that an export yields, in its order. `export_hf_weights` takes some of them and then yields only
        those. They need no preparation: plans are made once, automatically."""
        from mbridge_rl.megatron.parameters import model_dtype

        return self.bridge.metadata(model_dtype(chunks_of(megatron_model)))

    def export_hf_weights(
        self,
        model: Model,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Sequence[HFTensor] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> Iterator[HFWeightTuple]:
        """Yields `(hf_name, tensor)` with full tensors on every rank, as `mbridge_rl.AutoBridge.export_weights` does.

        Raises:
            BridgeError: a task was not made by `get_conversion_tasks`.
        """
        hf_names = None if conversion_tasks is None else self._names(conversion_tasks)

        def start(ranks: Sequence[int] | None) -> Iterator[tuple[str, Tensor]]:
            stream = self.bridge.export_weights(
                chunks_of(model), dtype=weight_dtype, ranks=ranks, merge_adapters=merge_adapter_weights
            )
            for hf_name, tensor in stream:
                if hf_names is None or hf_name in hf_names:
                    yield HFWeightTuple(hf_name, tensor.cpu() if cpu else tensor)

        return HFStream(start)

    def export_adapter_weights(
        self, model: Model, cpu: bool = True, show_progress: bool = True, **kwargs: Any
    ) -> Iterator[HFWeightTuple]:
        """Yields the adapters alone, by their names in the base model (`<module>.lora_A.weight`); `save_hf_adapter` uses PEFT's
        names."""
        refuse("export_adapter_weights", kwargs)

        def start(ranks: Sequence[int] | None) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.bridge.export_adapter_weights(chunks_of(model), ranks=ranks):
                yield HFWeightTuple(name.removeprefix("base_model.model."), tensor.cpu() if cpu else tensor)

        return HFStream(start)

    def save_hf_weights(
        self,
        model: Model,
        path: str | Path,
        show_progress: bool = True,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """Writes weights and config into a folder, whose other files stay; adapters are merged. All ranks must see the
        folder."""
        unmerged = {"merge_adapter_weights=False": not merge_adapter_weights}
        refuse("save_hf_weights", {**unmerged, "weight_dtype": weight_dtype})
        self.bridge.save_pretrained(chunks_of(model), path)

    def save_hf_pretrained(self, model: Model, path: str | Path, show_progress: bool = True, **kwargs: Any) -> None:
        """Does the same as `save_hf_weights`, and also writes the tokenizer and other files of the bridge's own checkpoint."""
        source_path = kwargs.pop("source_path", None)
        refuse("save_hf_pretrained", {"source_path": source_path})
        self.save_hf_weights(model, path, show_progress, **kwargs)

    def save_hf_adapter(
        self,
        model: Model,
        path: str | Path,
        peft_config: Any = None,
        base_model_name_or_path: str | None = None,
        show_progress: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes the adapters in PEFT's format, with the config with which they were attached; `peft_config` has no effect."""
        refuse("save_hf_adapter", {"base_model_name_or_path": base_model_name_or_path, **kwargs})
        self.bridge.save_adapter(chunks_of(model), path)

    def _loaded(self, model: list[nn.Module], hf_path: str | Path | None) -> list[nn.Module]:
        self.bridge.load_weights(model, hf_path)
        return model

    def _names(self, tasks: Sequence[Any]) -> set[str]:
        unknown = [task for task in tasks if not isinstance(task, HFTensor) or task.hf_name not in self.bridge.spec.hf_shapes]
        if unknown:
            raise BridgeError(f"conversion_tasks must be of this bridge's get_conversion_tasks, found {unknown[0]!r}")
        return {task.hf_name for task in tasks}
