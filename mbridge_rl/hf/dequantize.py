"""Quantized checkpoints as plain ones, dequantized when read: fp8 with block scales (DeepSeek-V3) or one scale per tensor, and
mxfp4 (GPT-OSS).

The trainer holds bf16 or fp32, and an ordinary export is a plain checkpoint; `core.quantize` is the way back to fp8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mbridge_rl.core.errors import StateMismatchError, UnsupportedModelError
from mbridge_rl.core.model import HFTensor

SUPPORTED = ("fp8", "mxfp4")

_QUANTIZATION_FIELDS = ("quantization_config", "compression_config")

_SCALE = "_scale_inv"  # fp8 in blocks: `X.weight` and `X.weight_scale_inv`
_TENSOR_SCALE = ".weight_scale"  # fp8 with one scale: `X.weight` and `X.weight_scale`
_BLOCKS, _SCALES = "_blocks", "_scales"  # mxfp4: `X_blocks` and `X_scales`
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_BIAS = 127


class Dequantized(Mapping[str, Tensor]):
    """The tensors that a quantized checkpoint stands for, by `hf_name`; each is dequantized when it is asked for.

    Args:
        tensors: of the checkpoint, scales included.
        quantization_config: from its config.json.
        dtype: of the dequantized tensors; others keep theirs.

    Raises:
        UnsupportedModelError: another method than `SUPPORTED`.
        StateMismatchError: scales without weights, or of a shape that does not fit (when the tensor is read).
    """

    def __init__(self, tensors: Mapping[str, Tensor], quantization_config: Any, dtype: torch.dtype) -> None:
        config = require_supported(quantization_config)
        self._tensors, self._dtype = tensors, dtype
        self._block = tuple(config.get("weight_block_size") or (128, 128))
        scales = {name for name in tensors if name.endswith((_SCALE, _SCALES, _TENSOR_SCALE))}
        self._names = [self._plain(name) for name in tensors if name not in scales]
        orphans = [name for name in scales if self._of_scale(name) not in tensors]
        if orphans:
            raise StateMismatchError(f"scales without weights: {', '.join(sorted(orphans)[:8])}; the checkpoint is incomplete")

    def __getitem__(self, hf_name: str) -> Tensor:
        if hf_name + _BLOCKS in self._tensors:
            blocks, scales = self._tensors[hf_name + _BLOCKS], self._tensors[hf_name + _SCALES]
            return dequantize_mxfp4(blocks, scales, self._dtype)
        if hf_name + _SCALE in self._tensors:
            return dequantize_fp8(hf_name, self._tensors[hf_name], self._tensors[hf_name + _SCALE], self._block, self._dtype)
        if (one := _tensor_scale_of(hf_name)) in self._tensors:
            return (self._tensors[hf_name].float() * self._tensors[one].float()).to(self._dtype)
        return self._tensors[hf_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def tensors(self) -> dict[str, HFTensor]:
        """Names, dtypes and shapes of what reading gives; nothing is dequantized."""
        return {hf_name: self._described(hf_name) for hf_name in self._names}

    def _described(self, hf_name: str) -> HFTensor:
        if hf_name + _BLOCKS in self._tensors:
            experts, rows, groups, width = self._tensors[hf_name + _BLOCKS].shape
            return HFTensor(hf_name, self._dtype, (experts, groups * width * 2, rows))
        stored = self._tensors[hf_name]
        scaled = hf_name + _SCALE in self._tensors or _tensor_scale_of(hf_name) in self._tensors
        return HFTensor(hf_name, self._dtype if scaled else stored.dtype, tuple(stored.shape))

    @staticmethod
    def _plain(name: str) -> str:
        return name.removesuffix(_BLOCKS)

    @staticmethod
    def _of_scale(name: str) -> str:
        if name.endswith(_TENSOR_SCALE):
            return name.removesuffix("_scale")
        return name.removesuffix(_SCALE) if name.endswith(_SCALE) else name.removesuffix(_SCALES) + _BLOCKS


def _tensor_scale_of(hf_name: str) -> str:
    return f"{hf_name}_scale" if hf_name.endswith(".weight") else ""


def quantization_of(hf_config: Any) -> Any:
    """What a config says of its checkpoint's quantization, `None` where it is not quantized."""
    text_config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    configs = (getattr(config, field, None) for config in (hf_config, text_config) for field in _QUANTIZATION_FIELDS)
    return next((config for config in configs if config), None)


def require_supported(quantization_config: Any) -> Mapping[str, Any]:
    """The quantization config as a mapping; raises UnsupportedModelError for a method that cannot be imported."""
    config = quantization_config if isinstance(quantization_config, Mapping) else quantization_config.to_dict()
    method = config.get("quant_method")
    if method not in SUPPORTED:
        raise UnsupportedModelError(
            f"quantization_config has quant_method={method!r}; checkpoints quantized by {' and '.join(SUPPORTED)} can be "
            f"imported, dequantize this one first"
        )
    return config


def dequantize_fp8(hf_name: str, weight: Tensor, scale: Tensor, block: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`weight [rows, columns]` times its block's `scale [ceil(rows / block), ceil(columns / block)]`, in fp32, then `dtype`."""
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if tuple(scale.shape) != expected:
        raise StateMismatchError(
            f"{hf_name}{_SCALE} has shape {list(scale.shape)}, blocks of {list(block)} of {list(weight.shape)} "
            f"need {list(expected)}"
        )
    result = torch.empty(weight.shape, dtype=dtype)
    widths = scale.float().repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]
    for index, row in enumerate(range(0, weight.shape[0], block[0])):  # a row of blocks at a time bounds the fp32 copy
        rows = slice(row, row + block[0])
        result[rows] = (weight[rows].float() * widths[index]).to(dtype)
    return result


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Two e2m1 numbers a byte, times a power of two for every 32 of them (OCP Microscaling Formats v1.0).

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
