"""Megatron-Bridge's model provider: an object with a model's configuration as attributes, which builds the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.integrations.common import NotOffered, refuse
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.parallel import current_layout, initialize_parallel
from mbridge_rl.megatron.versions.config import field_names

Hook = Callable[[list[nn.Module]], list[nn.Module] | None]

_AXES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "context_parallel_size": "cp",
}
_DEALING = {
    "num_layers_in_first_pipeline_stage": "first_stage_layers",
    "num_layers_in_last_pipeline_stage": "last_stage_layers",
    "account_for_embedding_in_pipeline_split": "embedding_as_layer",
    "account_for_loss_in_pipeline_split": "loss_as_layer",
    "pipeline_model_parallel_layout": "pipeline_layout",
}
_BUILT_FROM = ("params_dtype", "pipeline_dtype", "fp16", "bf16", "sequence_parallel", "moe_grouped_gemm")
_OF_THE_MODEL = ("num_layers", "vocab_size", "share_embeddings_and_output_weights")
_IGNORED = ("seq_length", "should_pad_vocab", "use_cpu_initialization", "init_method_std", "autocast_dtype")


class Provider:
    """A provider whose attributes are the fields of Megatron's `TransformerConfig`.

    Raises:
        AttributeError: Megatron does not know a field.
        NotOffered: a field would make it another model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        set_here: dict[str, Any] = {"_spec": spec, "_given": {}, "_before": [], "_after": [], "_base": _whole_config(spec)}
        self.__dict__.update(set_here)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._given:
            return self._given[name]
        if name == "share_embeddings_and_output_weights":
            return self._spec.tied_embeddings
        if name == "vocab_size":
            return self._spec.vocab_size
        if name == "make_vocab_size_divisible_by":
            return 1
        return getattr(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_THE_MODEL and value != getattr(self, name):
            raise NotOffered(f"{name}={value!r}: the checkpoint says {getattr(self, name)!r}, and another model is not offered")
        known = field_names(type(self._base))
        if name not in known and name not in (*_OF_THE_MODEL, *_IGNORED, "make_vocab_size_divisible_by"):
            raise AttributeError(f"{name} is no field of Megatron's TransformerConfig; nothing would come of setting it")
        self._given[name] = value

    def apply_overrides_and_finalize(
        self, dtype: torch.dtype | None = None, overrides: Mapping[str, Any] | None = None
    ) -> Provider:
        """Sets the dtype and fields, and calls `finalize`."""
        if dtype is not None:
            self.params_dtype = dtype
            self.fp16, self.bf16 = dtype == torch.float16, dtype == torch.bfloat16
        for name, value in (overrides or {}).items():
            setattr(self, name, value)
        self.finalize()
        return self

    def finalize(self) -> None:
        """Checks the fields, as far as this is possible without ranks.

        Raises:
            ValueError, LayoutError: fields contradict each other, or the model.
        """
        self._config_for(self.layout())

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Registers a function that is called with the list of bare chunks before they are wrapped; it may return the list."""
        self._before.insert(0, hook) if prepend else self._before.append(hook)

    def register_post_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        """Registers a function that is called with the list of wrapped chunks; it may return another list."""
        self._after.insert(0, hook) if prepend else self._after.append(hook)

    def initialize_model_parallel(self, seed: int | None = None, seed_kwargs: Any = None, **kwargs: Any) -> None:
        """Starts Megatron's parallel state for the parallel sizes in the fields; data parallelism takes the remaining
        factor."""
        refuse("initialize_model_parallel", {"seed_kwargs": seed_kwargs, **kwargs})
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        layout = self.layout()
        layout = dataclasses.replace(layout, dp=max(1, world // (layout.tp * layout.pp * layout.cp)))
        initialize_parallel(layout, seed=1234 if seed is None else seed)

    def provide_distributed_model(
        self,
        ddp_config: Any = None,
        *,
        wrap_with_ddp: bool = True,
        fp16: bool | None = None,
        bf16: bool | None = None,
        pre_wrap_hook: Hook | None = None,
        post_wrap_hook: Hook | None = None,
        **kwargs: Any,
    ) -> list[nn.Module]:
        """Builds this rank's chunks; starts the parallel state if there is none.

        Args:
            ddp_config: Megatron's `DistributedDataParallelConfig`, or its fields.

        Raises:
            NotOffered: an argument is not supported (FSDP), or a hook replaced the output layer (value models).
            LayoutError: the parallel sizes in the fields are not those of the running parallel state.
        """
        harmless = (
            "model_type",
            "use_cpu_initialization",
            "data_parallel_random_init",
            "pg_collection",
            "mixed_precision_wrapper",
        )
        refuse("provide_distributed_model", kwargs, harmless)
        if fp16 or bf16:
            self.params_dtype = torch.float16 if fp16 else torch.bfloat16
        with megatron_runtime():
            from megatron.core import parallel_state

            from mbridge_rl.megatron.model import build_model

            if not parallel_state.model_parallel_is_initialized():
                self.initialize_model_parallel()
        layout = self._running_layout()
        hooks = [*self._before, *([pre_wrap_hook] if pre_wrap_hook else [])]

        def before(chunks: list[nn.Module]) -> None:
            heads = [getattr(chunk, "output_layer", None) for chunk in chunks]
            for hook in hooks:
                hook(chunks)
            if any(getattr(chunk, "output_layer", None) is not head for chunk, head in zip(chunks, heads, strict=True)):
                raise NotOffered("a hook replaced the output layer: value models are not offered")

        ddp = _fields_of(ddp_config) if wrap_with_ddp else False
        model = build_model(self._spec, layout, config=self._config_for(layout), ddp=ddp, before_wrapping=before)
        for hook in [*self._after, *([post_wrap_hook] if post_wrap_hook else [])]:
            model = hook(model) or model
        return model

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> nn.Module:
        """Builds one bare chunk, for training loops that wrap it themselves (Megatron-LM's `get_model`). Hooks are not called.

        Raises:
            NotOffered: embedding or output layer would be elsewhere than on the first and the last stage.
        """
        from mbridge_rl.megatron.model import build_chunk

        layout = self._running_layout()
        with megatron_runtime():
            chunk = build_chunk(self._spec, layout, self._config_for(layout), vp_stage or 0)
        for name, wanted in (("pre_process", pre_process), ("post_process", post_process)):
            if wanted is not None and wanted != getattr(chunk, name):
                raise NotOffered(f"{name}={wanted} on a stage that has {name}={getattr(chunk, name)}")
        return chunk

    def layout(self) -> ParallelLayout:
        """The layout in the fields, with the smallest data parallelism that the expert axes allow."""
        sizes = {axis: self._given[name] for name, axis in _AXES.items() if self._given.get(name)}
        dealing = {axis: self._given[name] for name, axis in _DEALING.items() if self._given.get(name)}
        expert = sizes.get("ep", 1) * sizes.get("etp", sizes.get("tp", 1))
        dense = sizes.get("tp", 1) * sizes.get("cp", 1)
        multiple = self._given.get("make_vocab_size_divisible_by", 1)
        return ParallelLayout(**sizes, **dealing, dp=max(1, -(-expert // dense)), vocab_multiple=multiple)

    def config(self) -> Any:
        """Megatron's `TransformerConfig` of the fields."""
        return self._config_for(self.layout())

    def _running_layout(self) -> ParallelLayout:
        return dataclasses.replace(self.layout(), dp=current_layout().dp, order=current_layout().order)

    def _config_for(self, layout: ParallelLayout) -> Any:
        from mbridge_rl.megatron.model import transformer_config

        from_elsewhere = (*_AXES, *_DEALING, *_BUILT_FROM, *_OF_THE_MODEL, *_IGNORED, "make_vocab_size_divisible_by")
        overrides = {name: value for name, value in self._given.items() if name not in from_elsewhere}
        return transformer_config(
            self._spec,
            layout,
            self._dtype(),
            self._given.get("sequence_parallel"),
            self._given.get("moe_grouped_gemm", True),
            overrides,
        )

    def _dtype(self) -> torch.dtype:
        if self._given.get("fp16"):
            return torch.float16
        return torch.bfloat16 if self._given.get("bf16") else self._given.get("params_dtype", torch.bfloat16)


def _whole_config(spec: ModelSpec) -> Any:
    from mbridge_rl.megatron.model import transformer_config

    return transformer_config(spec, ParallelLayout(), torch.bfloat16)


def _fields_of(ddp_config: Any) -> bool | dict[str, Any]:
    if ddp_config is None or isinstance(ddp_config, Mapping):
        return dict(ddp_config or {}) or True
    return {field.name: getattr(ddp_config, field.name) for field in dataclasses.fields(ddp_config) if field.init}
