"""The adapters of a live Megatron model as a side of a plan.

The code that attached them (`megatron.lora.attach`, or another library's) has set `adapter_parameter_names` and `lora.scale` on
every adapted linear, and `lora_config` on every innermost model. The placement of adapters follows from the rules
(`core.adapters`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.segments import Side, megatron_side
from mbridge_rl.megatron.live_tensors import LiveTensors
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parameters import global_name_of

_OUTPUT_FACTOR = re.compile(r"\.lora_(start_)?b\d*$")


class LiveAdapters(LiveTensors):
    """This rank's adapter factors by global `megatron_name`, at the time of its creation; make a new one for every transfer.

    Args:
        scaled: whether `B` is multiplied by its adapter's scale when it is read, for engines; files store the scale separately.
    """

    def __init__(self, model: Sequence[nn.Module], experts_before: int, *, scaled: bool = False) -> None:
        super().__init__()
        self._scales: dict[str, float] = {}
        for chunk in unwrap(model):
            layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            for local_name, module in chunk.named_modules():
                for factor in getattr(module, "adapter_parameter_names", ()):
                    name = global_name_of(f"{local_name}.{factor}", layers, experts_before)
                    self._parameters[name] = getattr(module, factor)
                    if scaled and _OUTPUT_FACTOR.search(name):
                        self._scales[name] = module.lora.scale

    def __getitem__(self, megatron_name: str) -> Tensor:
        factor = super().__getitem__(megatron_name)
        if (scale := self._scales.get(megatron_name, 1.0)) == 1.0:
            return factor
        return factor.float() * scale  # rounded only once, when it is cast to the dtype that is sent


def lora_config_of(model: Sequence[nn.Module]) -> LoRAConfig:
    """The config of the adapters of a live model.

    Raises:
        StateMismatchError: the model has no adapters.
    """
    config = getattr(unwrap(model)[0], "lora_config", None)
    if config is None:
        raise StateMismatchError("this model has no adapters: attach them with add_lora before")
    return config


def require_replaceable_base(model: Sequence[nn.Module]) -> None:
    """Raises StateMismatchError if adapters are merged into the weights of a live model, or were computed from them."""
    chunks = unwrap(model)
    config = getattr(chunks[0], "lora_config", None)
    if config is not None and (config.dora or config.keeps_start):
        adapters = "DoRA's magnitudes" if config.dora else f"{config.start} adapters"
        raise StateMismatchError(
            f"{adapters} were made from the weights that this model has: load weights before add_lora. Nothing was changed"
        )
    attached = (getattr(module, "lora", None) for chunk in chunks for module in chunk.modules())
    if any(getattr(adapter, "base", None) is not None for adapter in attached):
        raise StateMismatchError("adapters are merged into this model's weights: call unmerge_adapters. Nothing was changed")


def live_adapter_side(
    model: Sequence[nn.Module], spec: ModelSpec, layout: ParallelLayout, rank: int, *, scaled: bool = False
) -> tuple[LiveAdapters, ModelSpec, Side]:
    """This rank's live factors, the adapters' spec, and this rank's side, checked against each other.

    Args:
        spec: the spec of the base model.
        scaled: whether `B` is multiplied by the adapters' scale when it is read.

    Raises:
        StateMismatchError: the model has no adapters, or other adapters than its config describes.
    """
    config = lora_config_of(model)
    adapters = adapter_spec(spec, config)
    side = megatron_side(adapters, layout, rank)
    experts_before = layout.coordinates(rank).ep * (spec.num_experts or 0) // layout.ep
    live = LiveAdapters(model, experts_before, scaled=scaled)
    live.check(side, rank)
    return live, adapters, side
