"""This bridge with the interface of `mbridge.AutoBridge` (0.15), as verl and others use it: change the import to
`from mbridge_rl.integrations.mbridge import AutoBridge`.

Features that are not offered are refused by name: value models (heads of one output), FSDP, custom `mbridge.ParallelStates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl import bridge as own
from mbridge_rl.bridges import FAMILIES
from mbridge_rl.integrations.common import HFStream, NotOffered, chunks_of, refuse

_SET_BY_LAYOUT = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "expert_tp",
    "context_parallel_size": "cp",
}


class AutoBridge:
    """Makes the bridge of a model."""

    @classmethod
    def from_pretrained(cls, hf_model_path: str, trust_remote_code: bool = False, **kwargs: Any) -> Bridge:
        """Makes the bridge of a checkpoint directory, or of a name on the hub. Remote code is never run."""
        bridge = own.AutoBridge.from_pretrained(hf_model_path)
        return Bridge(bridge.hf_config, bridge=bridge, **kwargs)

    @classmethod
    def from_config(cls, hf_config: Any, **kwargs: Any) -> Bridge:
        """Makes the bridge of a Transformers config."""
        return Bridge(hf_config, **kwargs)

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """The architectures, by their names in configs."""
        return list(FAMILIES)


class Bridge:
    """One model's bridge, for the running parallel state.

    Args:
        dtype: the parameters' dtype.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this number times the tensor parallel size.

    Attributes:
        config: Megatron's `TransformerConfig`; changes in it apply to the next `get_model`.

    Raises:
        NotOffered: `parallel_states` is given.
        BridgeError: see `mbridge_rl.AutoBridge.from_config`.
    """

    def __init__(
        self,
        hf_config: Any,
        dtype: torch.dtype = torch.bfloat16,
        parallel_states: Any = None,
        make_vocab_size_divisible_by: int | None = None,
        *,
        bridge: own.AutoBridge | None = None,
    ) -> None:
        from mbridge_rl.megatron.parallel import current_layout

        refuse("mbridge.Bridge", {"parallel_states": parallel_states})
        self.hf_config, self.dtype = hf_config, dtype
        self.extra_args: dict[str, Any] = {}
        self.bridge = bridge or own.AutoBridge.from_config(hf_config)
        layout = current_layout()
        if make_vocab_size_divisible_by is not None:
            layout = replace(layout, vocab_multiple=make_vocab_size_divisible_by)
        self.layout = layout
        self.config = self._build_config()

    def set_extra_args(self, **kwargs: Any) -> None:
        """Sets further fields of Megatron's config.

        Raises:
            ValueError: Megatron does not know a field, or it contradicts the running parallel state.
        """
        self.extra_args.update(kwargs)
        self.config = self._build_config()

    def get_model(
        self,
        weight_path: str | None = None,
        model_type: Any = None,
        wrap_with_ddp: bool = False,
        fp16: bool = False,
        bf16: bool = True,
        *,
        ddp_config: dict[str, Any] | None = None,
        post_model_creation_callbacks: Sequence[Callable[..., Any]] = (),
        **kwargs: Any,
    ) -> list[nn.Module]:
        """This rank's chunks, wrapped as Megatron's training loops expect them; with weights if `weight_path` is given.

        Args:
            post_model_creation_callbacks: functions that are called as
                `callback(model, pre_process=, post_process=, config=, hf_config=)` for every chunk, before it is wrapped.

        Raises:
            NotOffered: an argument is not supported, or a callback put a value head into the model.
        """
        harmless = ("use_cpu_initialization", "data_parallel_random_init", "use_precision_aware_optimizer")
        refuse("mbridge.get_model", kwargs, harmless)
        dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
        config = self.config
        config.params_dtype = config.pipeline_dtype = dtype
        config.fp16, config.bf16 = fp16, bf16 and not fp16

        def call_back(chunks: list[nn.Module]) -> None:
            for chunk in chunks:
                head = getattr(chunk, "output_layer", None)
                for callback in post_model_creation_callbacks:
                    ends = {"pre_process": chunk.pre_process, "post_process": chunk.post_process}
                    callback(chunk, **ends, config=config, hf_config=self.hf_config)
                if getattr(chunk, "output_layer", None) is not head:
                    raise NotOffered("a callback replaced the output layer: value models are not offered")

        ddp: bool | dict[str, Any] = (ddp_config or True) if wrap_with_ddp else False
        models = self.bridge.build_model(self.layout, ddp=ddp, config=config, before_wrapping=call_back)
        if weight_path is not None:
            self.load_weights(models, weight_path)
        return models

    def load_weights(self, models: Sequence[nn.Module], weights_path: str | Path, memory_efficient: bool = False) -> None:
        """Fills the model as `mbridge_rl.AutoBridge.load_weights` does. Every rank reads only its own part; `memory_efficient`
        has no effect."""
        self.bridge.load_weights(chunks_of(models), weights_path)

    def export_weights(self, models: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """Yields `(hf_name, tensor)` with full tensors on every rank, as `mbridge_rl.AutoBridge.export_weights` does."""
        return HFStream(lambda ranks: self.bridge.export_weights(chunks_of(models), ranks=ranks))

    def save_weights(
        self,
        models: Sequence[nn.Module],
        weights_path: str | Path,
        memory_efficient: bool = False,
        distributed_filesystem: bool = False,
    ) -> None:
        """Writes weights and config into a folder, whose other files stay. The flags have no effect: every rank writes its own
        bytes, nothing is gathered, and all ranks must see the folder."""
        self.bridge.save_pretrained(chunks_of(models), weights_path)

    def _build_config(self) -> Any:
        from mbridge_rl.megatron.model import transformer_config

        overrides = {"variable_seq_lengths": True, **self.extra_args}
        for name, axis in _SET_BY_LAYOUT.items():
            if name in overrides and overrides[name] in (None, getattr(self.layout, axis)):
                del overrides[name]
        sequence_parallel = overrides.pop("sequence_parallel", self.layout.tp > 1)
        grouped = overrides.pop("moe_grouped_gemm", True)
        return transformer_config(
            self.bridge.spec, self.layout, self.dtype, sequence_parallel, grouped_experts=grouped, overrides=overrides
        )
