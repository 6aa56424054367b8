"""The tensors of a live Megatron model in quantized form, which a plan of the quantized spec reads on every rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.quantize import FP8, Fp8, maxima, quantized, scale_names, scales
from mbridge_rl.core.segments import Segment, Side
from mbridge_rl.core.tensor_cache import TensorCache
from mbridge_rl.distributed.group import RankGroup


class QuantizedLive(Mapping[str, Tensor]):
    """This rank's tensors under the names of `side`: weights in fp8, their scales, and the other tensors as they are. All ranks
    make it together, anew for every transfer; the one collective is a maximum over 4 bytes per block.

    A weight is quantized when it is read, so that no second copy of the model exists. The last results are cached
    (`TensorCache`), because the parts of a fused tensor, and the parts for several workers, are read shortly after each other.

    Args:
        spec: the quantized spec (`core.quantize.quantized_spec`).
        scheme: the quantization.
        side: this rank's side of that spec.
        live: this rank's tensors as trained, merged if they have adapters.
        group: the ranks.
    """

    def __init__(self, spec: ModelSpec, scheme: Fp8, side: Side, live: Mapping[str, Tensor], group: RankGroup) -> None:
        self._side, self._live = side, live
        with group.fail_together():
            largest = maxima(spec, scheme, side, live)
        numbers = group.maximum(torch.cat([value.flatten() for value in largest.values()]))
        parts = numbers.split([value.numel() for value in largest.values()])
        combined = {name: part.view(value.shape) for (name, value), part in zip(largest.items(), parts, strict=True)}
        self._scales = scales(combined)
        self._weights: dict[str, list[Segment]] = defaultdict(list)
        fp8 = scale_names(spec, scheme)
        for segment in side.segments:
            if segment.hf_name in fp8:
                self._weights[segment.local_name].append(segment)
        weights, scales_of = self._weights, self._scales  # without a reference to self, which would delay freeing it
        self._fp8 = TensorCache(lambda name: quantized(spec, scheme, weights[name], live[name], scales_of))

    def __getitem__(self, megatron_name: str) -> Tensor:
        if megatron_name in self._scales:
            return self._scales[megatron_name]
        if megatron_name not in self._weights:
            return self._live[megatron_name]
        return self._fp8[megatron_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._side.shapes)

    def __len__(self) -> int:
        return len(self._side.shapes)


def quantization_config(spec: ModelSpec, scheme: Fp8, dtypes: Mapping[str, torch.dtype]) -> dict[str, object]:
    """The `quantization_config` of a checkpoint's config.json (Transformers' `FineGrainedFP8Config`, vLLM's `fp8`).

    Args:
        spec: the quantized spec.
        scheme: the quantization.
        dtypes: the dtype of every HF tensor (`spec.hf_dtypes`).
    """
    module_dtypes = {name.rpartition(".")[0]: dtype for name, dtype in dtypes.items() if name.endswith(".weight")}
    matrices = {name.rpartition(".")[0] for name, shape in spec.hf_shapes.items() if len(shape) == 2}
    unquantized = sorted(module for module, dtype in module_dtypes.items() if dtype != FP8 and module in matrices)
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        **({"weight_block_size": list(scheme.block)} if scheme.block else {}),
        "modules_to_not_convert": unquantized,
    }
