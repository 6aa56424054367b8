"""Reads quantized checkpoints as plain ones; tensors are dequantized when they are read. The formats are fp8 with scales per
block, row or tensor (as DeepSeek-V3, Transformers and compressed-tensors write it), and mxfp4 (GPT-OSS).

The trainer holds bf16 or fp32, and an ordinary export is a plain checkpoint; `core.quantize` quantizes to fp8. Scales of
activations and of KV caches are left out: an engine uses them for rounding, and they belong to no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.hf.quantization import scheme_of

_SCALE = "_scale_inv"  # fp8: `X.weight` and `X.weight_scale_inv`, or `X` and `X_scale_inv` of stacked experts
_WEIGHT_SCALE = ".weight_scale"  # fp8 in another format: `X.weight` and `X.weight_scale`
_BLOCKS, _SCALES = "_blocks", "_scales"  # mxfp4: `X_blocks` and `X_scales`
_ACTIVATION_SUFFIXES = (
    *(".input_scale", ".output_scale", ".activation_scale", "_activation_scale"),
    *(".q_scale", ".k_scale", ".v_scale", ".prob_scale"),
)
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_BIAS = 127


class Dequantized(Mapping[str, Tensor]):
    """The dequantized tensors of a quantized checkpoint, by `hf_name`; each is dequantized when it is read.

    Args:
        tensors: the tensors of the checkpoint, scales included.
        quantization_config: the quantization config in its config.json.
        dtype: the dtype of the dequantized tensors; other tensors keep theirs.

    Attributes:
        scheme: how the weights are stored.

    Raises:
        UnsupportedModelError: the quantization method is not in `hf.quantization.SUPPORTED`.
        StateMismatchError: there are scales without weights, or scales of a wrong shape (when the tensor is read).
    """

    def __init__(self, tensors: Mapping[str, Tensor], quantization_config: Any, dtype: torch.dtype) -> None:
        self.scheme = scheme_of(quantization_config)
        self._tensors, self._dtype = tensors, dtype
        scales = {name for name in tensors if name.endswith((_SCALE, _SCALES, _WEIGHT_SCALE))}
        weights = (name for name in tensors if name not in scales and not name.endswith(_ACTIVATION_SUFFIXES))
        self._names = dict.fromkeys(name.removesuffix(_BLOCKS) for name in weights)
        if orphans := [name for name in scales if self._weight_of(name) not in tensors]:
            raise StateMismatchError(f"scales without weights: {listed(orphans)}; the checkpoint is incomplete ({self.scheme})")

    def __contains__(self, hf_name: object) -> bool:
        return hf_name in self._names

    def __getitem__(self, hf_name: str) -> Tensor:
        if hf_name not in self._names:  # such as a scale, which the plain checkpoint does not have
            raise KeyError(hf_name)
        if hf_name + _BLOCKS in self._tensors:
            blocks, scales = self._tensors[hf_name + _BLOCKS], self._tensors[hf_name + _SCALES]
            return dequantize_mxfp4(blocks, scales, self._dtype)
        if (scale := self._scale_of(hf_name)) is None:
            return self._tensors[hf_name]
        return dequantize_fp8(hf_name, self._tensors[hf_name], self._tensors[scale], self.scheme.block, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def tensors(self) -> dict[str, HFTensor]:
        """Names, dtypes and shapes of the dequantized tensors; nothing is dequantized for them."""
        return {hf_name: self._hf_tensor(hf_name) for hf_name in self._names}

    def _hf_tensor(self, hf_name: str) -> HFTensor:
        if hf_name + _BLOCKS in self._tensors:
            experts, rows, groups, width = self._tensors[hf_name + _BLOCKS].shape
            return HFTensor(hf_name, self._dtype, (experts, groups * width * 2, rows))
        stored = self._tensors[hf_name]
        return HFTensor(hf_name, stored.dtype if self._scale_of(hf_name) is None else self._dtype, tuple(stored.shape))

    def _scale_of(self, hf_name: str) -> str | None:
        """The name of an fp8 weight's scales; `None` if it has none."""
        names = (hf_name + _SCALE, f"{hf_name}_scale" if hf_name.endswith(".weight") else "")
        return next((name for name in names if name in self._tensors), None)

    @staticmethod
    def _weight_of(name: str) -> str:
        if name.endswith(_WEIGHT_SCALE):
            return name.removesuffix("_scale")
        return name.removesuffix(_SCALE) if name.endswith(_SCALE) else name.removesuffix(_SCALES) + _BLOCKS


def dequantize_fp8(hf_name: str, weight: Tensor, scale: Tensor, block: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`weight [..., rows, columns]` times its scale, computed in fp32 and cast to `dtype`.

    Args:
        scale: one number for all, one per row (`[rows]` or `[rows, 1]`), or one per block (`[ceil(rows / block), ceil(columns /
            block)]`). Stacked experts have `[experts, ...]`, with one of these for each expert.

    Raises:
        StateMismatchError: the scale has another shape.
    """
    if weight.dim() == 3 and scale.dim() >= 1 and scale.shape[0] == weight.shape[0]:
        experts = (dequantize_fp8(f"{hf_name}[{i}]", weight[i], scale[i], block, dtype) for i in range(len(weight)))
        return torch.stack(list(experts))
    rows, columns = weight.shape[-2:] if weight.dim() > 1 else (1, weight.numel())
    expected = tuple(-(-size // step) for size, step in zip((rows, columns), block, strict=True))
    if scale.numel() == 1:
        by_block, block = scale.reshape(1, 1), (rows, columns)
    elif tuple(scale.shape) in ((rows,), (rows, 1)):
        by_block, block = scale.reshape(rows, 1), (1, columns)
    elif tuple(scale.shape) == expected:
        by_block = scale
    else:
        raise StateMismatchError(
            f"{hf_name}{_SCALE} has shape {list(scale.shape)}, blocks of {list(block)} of {list(weight.shape)} "
            f"need {list(expected)}"
        )
    result = torch.empty(weight.shape, dtype=dtype)
    widths = by_block.float().repeat_interleave(block[1], dim=1)[:, :columns]
    target, source = result.view(rows, columns), weight.view(rows, columns)
    for index, row in enumerate(range(0, rows, block[0])):  # a row of blocks at a time bounds the fp32 copy
        part = slice(row, row + block[0])
        target[part] = (source[part].float() * widths[index]).to(dtype)
    return result


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes mxfp4: two e2m1 numbers per byte, times a power of two for every 32 of them (OCP Microscaling Formats v1.0).

    Args:
        blocks: `[experts, rows, groups, 16]` uint8, low nibble first.
        scales: `[experts, rows, groups]` uint8, biased exponents.

    Returns:
        `[experts, groups * 32, rows]`: GPT-OSS packs its experts transposed.
    """
    experts, rows, groups, width = blocks.shape
    values = torch.tensor(_FP4_VALUES, dtype=dtype)
    result = torch.empty(experts, groups * width * 2, rows, dtype=dtype)
    for expert in range(experts):
        pairs = torch.stack([values[(blocks[expert] & 0xF).long()], values[(blocks[expert] >> 4).long()]], dim=-1)
        exponents = scales[expert].to(torch.int32)[..., None] - _MXFP4_BIAS
        result[expert] = torch.ldexp(pairs.flatten(-2), exponents).to(dtype).view(rows, -1).t()
    return result
