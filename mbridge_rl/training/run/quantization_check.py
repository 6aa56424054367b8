"""Whether engines can run what a recipe's syncs will send: fp8, or plain weights. Known before anything is started."""

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
        ConfigError: with all that is wrong.
    """
    scheme = config.sync.quantization
    problems = _of_plain_weights(config, bridge) if scheme is None else _of_fp8(config, bridge, scheme)
    if found := list(problems):
        raise ConfigError("\n".join(found))


def _of_plain_weights(config: RunConfig, bridge: Any) -> Iterator[str]:
    quantization = quantization_of(bridge.hf_config)
    if not quantization:
        return
    held = _scheme_of(quantization)
    or_fp8 = "" if held is None else f"set sync.quantization={_in_yaml(held)}, or "
    yield (
        f"model.path={config.model.path} is {_described(quantization)}: engines start on it, and a sync sends plain weights; "
        f"{or_fp8}write a plain checkpoint (mbridge-rl convert {config.model.path} DIR) and set model.path=DIR"
    )


def _of_fp8(config: RunConfig, bridge: Any, scheme: Fp8) -> Iterator[str]:
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
    """What a sync sends to engines of such a checkpoint; `None` if it cannot."""
    found = require_supported(quantization)
    if found["quant_method"] != "fp8" or found.get("activation_scheme", "dynamic") != "dynamic":
        return None
    block = found.get("weight_block_size")
    return Fp8(tuple(block) if block else None)


def _described(quantization: Any) -> str:
    if not quantization:
        return "a plain checkpoint"
    found = require_supported(quantization)
    kept = {name: found[name] for name in ("quant_method", "activation_scheme", "weight_block_size") if found.get(name)}
    return f"quantized ({', '.join(f'{name}={value}' for name, value in kept.items())})"


def _in_yaml(scheme: Fp8) -> str:
    return f"{{block: {'null' if scheme.block is None else list(scheme.block)}}}"
