"""Exports and saves a live Megatron model in fp8. Every rank quantizes the tensors that it holds, before anything travels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.quantize import Fp8, quantized_spec
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.live_fp8 import QuantizedLive, quantization_config
from mbridge_rl.distributed.saving import save_together
from mbridge_rl.distributed.stream import TensorStream, Transport
from mbridge_rl.hf.writer import DEFAULT_SHARD_BYTES, StagingDirectory, plan_files


class LiveQuantizedBridge:
    """A live model whose weights are quantized to fp8 when they are read. All ranks make and use it together.

    Args:
        base: the spec of the model.
        model: this rank's model chunks.
        scheme: the quantization.
        dtype: the dtype of the tensors that are not quantized; `None` means the model's.

    Attributes:
        spec: the quantized spec.
        dtype: the dtype of the tensors that are not quantized.
    """

    def __init__(self, base: ModelSpec, model: Sequence[nn.Module], scheme: Fp8, dtype: torch.dtype | None = None) -> None:
        from mbridge_rl.megatron.parameters import layout_of, live_side, model_dtype

        self._group, self._scheme = RankGroup(), scheme
        with self._group.fail_together():
            self.spec = quantized_spec(base, scheme)
            layout = layout_of(model, base)
            live, _ = live_side(model, base, layout, self._group.rank)
            side = megatron_side(self.spec, layout, self._group.rank)
            self._plan = compile_plan(self.spec, megatron_side(self.spec, layout), hf_side(self.spec))
        self.dtype = dtype or model_dtype(model)
        self._live = QuantizedLive(self.spec, scheme, side, live, self._group)

    def export(self, ranks: Sequence[int] | None, transport: Transport) -> Iterator[tuple[str, Tensor]]:
        """See `AutoBridge.export_quantized_weights`."""
        stream = TensorStream(self._plan, self.spec.hf_dtypes(self.dtype), self._group, ranks=ranks, transport=transport)
        try:
            yield from stream.run(self._live)
        finally:
            stream.close()

    def save(self, directory: str | Path, write_companions: Callable[[Path, torch.dtype], None], *, durable: bool) -> None:
        """See `AutoBridge.save_quantized`."""
        dtypes = self.spec.hf_dtypes(self.dtype)
        staging = StagingDirectory(
            directory, plan_files(self.spec.hf_tensors(self.dtype), DEFAULT_SHARD_BYTES), durable=durable
        )

        def companions() -> None:
            write_companions(staging.path, self.dtype)
            path = staging.path / "config.json"
            config = json.loads(path.read_text())
            config["quantization_config"] = quantization_config(self.spec, self._scheme, dtypes)
            path.write_text(json.dumps(config, indent=2) + "\n")

        save_together(staging, self._plan, self._live, self._group, companions)
