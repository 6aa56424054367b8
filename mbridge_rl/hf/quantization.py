"""Reads a config's description of its checkpoint's quantization, and decides whether this library can read the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mbridge_rl.core.errors import UnsupportedModelError

SUPPORTED = ("fp8", "mxfp4", "compressed-tensors")

_FIELDS = ("quantization_config", "compression_config")
_DEFAULT_BLOCK = (128, 128)
# The formats of compressed-tensors that store an fp8 weight as `X.weight` and its scales as `X.weight_scale`.
_FP8_FORMATS = ("float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    Attributes:
        method: one of `SUPPORTED`.
        block: number of rows and columns that share an fp8 scale, if there is one scale per block.
    """

    method: str
    block: tuple[int, int]

    def __str__(self) -> str:
        return f"quantization_config.quant_method={self.method!r}"


def quantization_of(hf_config: Any) -> Any:
    """The quantization config of a Transformers config, or of its text part; `None` if there is none."""
    text_config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    candidates = (getattr(config, field, None) for config in (hf_config, text_config) for field in _FIELDS)
    return next((candidate for candidate in candidates if candidate), None)


def require_supported(quantization_config: Any) -> Mapping[str, Any]:
    """The quantization config as a mapping.

    Raises:
        UnsupportedModelError: the weights cannot be read; the message names the field that shows it.
    """
    config = quantization_config if isinstance(quantization_config, Mapping) else quantization_config.to_dict()
    method = config.get("quant_method")
    if method not in SUPPORTED:
        raise UnsupportedModelError(
            f"quantization_config has quant_method={method!r}; checkpoints quantized by {', '.join(SUPPORTED)} can be "
            f"imported, dequantize this one first"
        )
    for name, value, expected in _unsupported_fields(config) if method == "compressed-tensors" else ():
        raise UnsupportedModelError(
            f"quantization_config has quant_method='compressed-tensors' and {name}={value!r}; only {name}={expected} can be "
            f"imported, dequantize this checkpoint first"
        )
    return config


def scheme_of(quantization_config: Any) -> Scheme:
    """How the weights of a checkpoint with this quantization config are stored; raises the errors of `require_supported`."""
    config = require_supported(quantization_config)
    blocks = [config.get("weight_block_size"), *(weights.get("block_structure") for weights in _weights(config))]
    rows, columns = next((block for block in blocks if block), _DEFAULT_BLOCK)
    return Scheme(config["quant_method"], (int(rows), int(columns)))


def _weights(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The description of the weights in every group of compressed-tensors."""
    groups = config.get("config_groups") or {}
    return [group["weights"] for group in groups.values() if isinstance(group, Mapping) and group.get("weights")]


def _unsupported_fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Yields the name, the value and the supported values of fields of compressed-tensors that describe something else than fp8
    weights."""
    groups = config.get("config_groups") or {}
    formats = {"format": config.get("format")}
    formats |= {f"config_groups.{name}.format": group.get("format") for name, group in groups.items()}
    for name, value in formats.items():
        if value is not None and value not in _FP8_FORMATS:
            yield name, value, " or ".join(map(repr, _FP8_FORMATS))
    for name, group in groups.items():
        weights = group.get("weights") or {}
        for field, expected in (("type", "float"), ("num_bits", 8), ("symmetric", True), ("actorder", None)):
            if weights and weights.get(field, expected) != expected:
                yield f"config_groups.{name}.weights.{field}", weights[field], repr(expected)
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        yield "sparsity_config.format", sparsity["format"], "'dense'"
    if transforms := (config.get("transform_config") or {}).get("config_groups"):
        yield "transform_config.config_groups", sorted(transforms), "{}"
