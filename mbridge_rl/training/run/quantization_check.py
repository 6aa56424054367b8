"""Checks, before anything is started, that engines can run the format that a recipe's syncs will send: fp8, or plain
weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.quantize import Fp8, quantized_spec
from mbridge_rl.hf.quantization import quantization_of, require_supported
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.run.config_file import ConfigError


def require_format(config: RunConfig, bridge: Any) -> None:
    """Compares `sync.quantization` with the checkpoint that engines start on, with the model, and with this machine.

    Args:
        bridge: an `AutoBridge` of `config.model.path`.

    Raises:
        ConfigError: they do not fit; the message has all problems.
    """
    scheme = config.sync.quantization
    problems = _problems_of_plain_weights(config, bridge) if scheme is None else _problems_of_fp8(config, bridge, scheme)
    if messages := list(problems):
        raise ConfigError("\n".join(messages))


def _problems_of_plain_weights(config: RunConfig, bridge: Any) -> Iterator[str]:
    quantization = quantization_of(bridge.hf_config)
    if not quantization:
        return
    scheme = _scheme_of(quantization)
    or_fp8 = "" if scheme is None else f"set sync.quantization={_in_yaml(scheme)}, or "
    yield (
        f"model.path={config.model.path} is {_described(quantization)}: engines start on it, and a sync sends plain weights; "
        f"{or_fp8}write a plain checkpoint (mbridge-rl convert {config.model.path} DIR) and set model.path=DIR"
    )


def _problems_of_fp8(config: RunConfig, bridge: Any, scheme: Fp8) -> Iterator[str]:
    quantization = quantization_of(bridge.hf_config)
    try:
        quantized_spec(bridge.spec, scheme)
    except UnsupportedModelError as error:
        yield f"sync.quantization: {error}; leave it out"
    if not torch.cuda.is_available() and not torch.cpu._is_amx_tile_supported():
        yield (
            "sync.quantization: this machine has no GPU, and vLLM has no fp8 kernels for its CPU, which lacks AMX tiles; leave "
            "it out, or run where engines have one of them"
        )
    if not quantization or _scheme_of(quantization) != scheme:
        yield (
            f"sync.quantization={_in_yaml(scheme)}: engines start on model.path={config.model.path}, which is "
            f"{_described(quantization)}; write it in that format (AutoBridge.save_quantized(model, DIR, {scheme})) and set "
            "model.path=DIR, or leave sync.quantization out"
        )


def _scheme_of(quantization: Any) -> Fp8 | None:
    """The scheme in which a sync sends weights to engines of such a checkpoint; `None` if there is none."""
    settings = require_supported(quantization)
    if settings["quant_method"] != "fp8" or settings.get("activation_scheme", "dynamic") != "dynamic":
        return None
    block = settings.get("weight_block_size")
    return Fp8(tuple(block) if block else None)


def _described(quantization: Any) -> str:
    if not quantization:
        return "a plain checkpoint"
    settings = require_supported(quantization)
    named = ("quant_method", "activation_scheme", "weight_block_size")
    return f"quantized ({', '.join(f'{name}={settings[name]}' for name in named if settings.get(name))})"


def _in_yaml(scheme: Fp8) -> str:
    return f"{{block: {'null' if scheme.block is None else list(scheme.block)}}}"
