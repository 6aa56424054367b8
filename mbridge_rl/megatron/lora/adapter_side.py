"""The adapters of a live Megatron model as a side of a plan.

What attaches them (`megatron.lora.attach`, or anybody's) leaves on every adapted linear `adapter_parameter_names` and
`lora.scale`, and on every innermost model `lora_config`; their placement follows from the rules (`core.adapters`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.segments import Side, megatron_side
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.parameters import check_held, global_name_of

_OF_OUTPUT = re.compile(r"\.lora_(start_)?b\d*$")


class LiveAdapters(Mapping[str, Tensor]):
    """This rank's adapter factors by global `megatron_name`, looked up now; made anew for every transfer.

    Args:
        scaled: multiply `B` by its adapter's scale when it is read, for engines; files state the scale beside.
    """

    def __init__(self, model: Sequence[nn.Module], experts_before: int, *, scaled: bool = False) -> None:
        self._parameters: dict[str, Tensor] = {}
        self._scales: dict[str, float] = {}
        for chunk in unwrap(model):
            layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
            for local_name, module in chunk.named_modules():
                for factor in getattr(module, "adapter_parameter_names", ()):
                    name = global_name_of(f"{local_name}.{factor}", layers, experts_before)
                    self._parameters[name] = getattr(module, factor)
                    if scaled and _OF_OUTPUT.search(name):
                        self._scales[name] = module.lora.scale

    def __getitem__(self, megatron_name: str) -> Tensor:
        factor = self._parameters[megatron_name].detach()
        if (scale := self._scales.get(megatron_name, 1.0)) == 1.0:
            return factor
        return factor.float() * scale  # rounded once, to the dtype that travels

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def parameter(self, megatron_name: str) -> Tensor:
        """The parameter object, which optimizers know."""
        return self._parameters[megatron_name]

    def stored(self, megatron_name: str) -> Tensor:
        """The parameter itself: what an import writes."""
        return self._parameters[megatron_name].detach()


def lora_config_of(model: Sequence[nn.Module]) -> LoRAConfig:
    """What the adapters of a live model are.

    Raises:
        StateMismatchError: it has none.
    """
    config = getattr(unwrap(model)[0], "lora_config", None)
    if config is None:
        raise StateMismatchError("this model has no adapters: attach them with training.lora.add_lora before")
    return config


def require_replaceable_base(model: Sequence[nn.Module]) -> None:
    """Raises StateMismatchError where adapters are merged into the weights of a live model, or were made from them."""
    chunks = unwrap(model)
    config = getattr(chunks[0], "lora_config", None)
    if config is not None and (config.dora or config.keeps_start):
        what = "DoRA's magnitudes" if config.dora else f"{config.start} adapters"
        raise StateMismatchError(
            f"{what} were made from the weights that this model has: load weights before add_lora. Nothing was changed"
        )
    adapters = (getattr(module, "lora", None) for chunk in chunks for module in chunk.modules())
    if any(getattr(adapter, "base", None) is not None for adapter in adapters):
        raise StateMismatchError("adapters are merged into this model's weights: call unmerge_adapters. Nothing was changed")


def live_adapter_side(
    model: Sequence[nn.Module], spec: ModelSpec, layout: ParallelLayout, rank: int, *, scaled: bool = False
) -> tuple[LiveAdapters, ModelSpec, Side]:
    """This rank's live factors, the adapters' spec, and this rank's segments of it, compared with each other.

    Args:
        spec: of the base model.
        scaled: multiply `B` by the adapters' scale when it is read.

    Raises:
        StateMismatchError: the model has no adapters, or other ones than its config says.
    """
    config = lora_config_of(model)
    adapters = adapter_spec(spec, config)
    side = megatron_side(adapters, layout, rank)
    experts_before = layout.coordinates(rank).ep * (spec.num_experts or 0) // layout.ep
    live = LiveAdapters(model, experts_before, scaled=scaled)
    check_held(live._parameters, side, rank)
    return live, adapters, side
