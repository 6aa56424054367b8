"""Exports the adapters of a live Megatron model, saves them as PEFT files, and loads them from such files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mbridge_rl.core import virtual
from mbridge_rl.core.adapters import adapted_linears
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.saving import save_together
from mbridge_rl.distributed.stream import TensorStream, Transport
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.peft import adapter_file, open_adapter, read_lora_config, require_loadable, write_lora_config
from mbridge_rl.hf.state import check_hf_state
from mbridge_rl.hf.writer import StagingDirectory

if TYPE_CHECKING:
    from mbridge_rl.megatron.lora.adapter_side import LiveAdapters

Source = str | Path | Mapping[str, Tensor]


class LiveAdapterBridge:
    """The adapters of one live model, as they are now. All ranks make and use it together.

    Args:
        base: the spec of the model without adapters.
        model: this rank's model chunks.
        group: the ranks; by default all ranks.

    Attributes:
        config: the config of the attached adapters.
        layout: the layout of the model.
        spec: the spec of the adapters (`core.adapters.adapter_spec`).

    Raises:
        StateMismatchError: on all ranks: the model has no adapters, or others than its config describes.
    """

    def __init__(self, base: ModelSpec, model: Sequence[nn.Module], group: RankGroup | None = None) -> None:
        from mbridge_rl.megatron.lora.adapter_side import live_adapter_side, lora_config_of
        from mbridge_rl.megatron.parameters import layout_of, model_dtype

        self._base, self._group = base, group or RankGroup()
        with self._group.fail_together():
            self.config: LoRAConfig = lora_config_of(model)
            self.layout: ParallelLayout = layout_of(model, base)
            self._dtype = model_dtype(model)
            live, self.spec, side = live_adapter_side(model, base, self.layout, self._group.rank)
            self._live: LiveAdapters = live
            self._side: Side = side
            self._plan = compile_plan(self.spec, megatron_side(self.spec, self.layout), hf_side(self.spec))

    def export(
        self, dtype: torch.dtype | None, ranks: Sequence[int] | None, transport: Transport
    ) -> Iterator[tuple[str, Tensor]]:
        """See `AutoBridge.export_adapter_weights`."""
        dtypes = self.spec.hf_dtypes(dtype or self._dtype)
        stream = TensorStream(self._plan, dtypes, self._group, ranks=ranks, transport=transport)
        try:
            yield from stream.run(self._live)
        finally:
            stream.close()

    def save(self, directory: str | Path, base: str | None, *, dtype: torch.dtype | None, durable: bool) -> None:
        """See `AutoBridge.save_adapter`."""
        file = adapter_file(self.spec.hf_tensors(dtype or self._dtype))
        staging = StagingDirectory(directory, [file], durable=durable)

        def write_config() -> None:
            write_lora_config(self._base, self.config, base, staging.path)

        save_together(staging, self._plan, self._live, self._group, write_config)

    def load(self, source: Source) -> None:
        """See `AutoBridge.load_adapter`."""
        with self._group.fail_together():
            where = "the given adapter" if isinstance(source, Mapping) else str(source)
            if not isinstance(source, Mapping):
                self._require_same_scale(read_lora_config(self._base, source), where)
            tensors = source if isinstance(source, Mapping) else open_adapter(source)
            check_hf_state(self.spec, tensors.tensors if isinstance(tensors, Checkpoint) else tensors, where)
            require_loadable(self.spec, tensors, where)
            plan = compile_plan(self.spec, hf_side(self.spec), self._side)
        targets = {name: self._live.stored(name) for name in self._live}
        with self._group.fail_together():
            if isinstance(tensors, Checkpoint):
                tensors.load(plan, targets)
            else:
                factors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
                virtual.run(plan, {0: factors}, {self._group.rank: targets})

    def _require_same_scale(self, source_config: LoRAConfig, where: str) -> None:
        own_linears = adapted_linears(self._base, self.config)
        for name, source in adapted_linears(self._base, source_config).items():
            own = own_linears.get(name, source)
            if (source.rank, source.scale) != (own.peft_rank, own.scale):
                raise StateMismatchError(
                    f"{where} has rank {source.rank} and scale {source.scale:g}, the model's adapters {own.peft_rank} and "
                    f"{own.scale:g}: attach them with AutoBridge.adapter_config({where!r}). Found at {name}; "
                    f"nothing was changed"
                )
