"""Llama-Nemotron (DeciLM, found by Puzzle, arXiv 2411.19146): Llama whose layers have KV heads and MLPs of their own sizes, or
lack attention or MLP altogether."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from mbridge_rl.bridges.blocks import Block, attention, decoder, gated_mlp
from mbridge_rl.core.errors import UnsupportedModelError
from mbridge_rl.core.model import ModelSpec


def nemotron_nas(hf: Any) -> ModelSpec:
    heads = [_kv_heads(hf, layer) for layer in range(hf.num_hidden_layers)]
    widths = [_ffn_size(hf, layer) for layer in range(hf.num_hidden_layers)]
    layers = [
        {"attention": {"num_query_groups": kv, "no_op": kv is None}, "mlp": {"ffn_hidden_size": f, "no_op": f is None}}
        for kv, f in zip(heads, widths, strict=True)
    ]
    sizes = Block({"heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": layers})})
    attentions = _by_size(hf, attention, "num_key_value_heads", heads)
    return decoder(hf, *attentions, *_by_size(hf, gated_mlp, "intermediate_size", widths), sizes)


def _by_size(hf: Any, block: Callable[[Any], Block], field: str, sizes: list[int | None]) -> list[Block]:
    """The block in each of its sizes, in the layers that have it so."""
    blocks = []
    for size in sorted({size for size in sizes if size is not None}):
        of_size = copy.copy(hf)
        setattr(of_size, field, size)
        blocks.append(block(of_size).only_in(tuple(layer for layer, found in enumerate(sizes) if found == size)))
    return blocks


def _kv_heads(hf: Any, layer: int) -> int | None:
    block = hf.block_configs[layer].attention
    for name in ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens"):
        _refuse(hf, layer, "attention", name)
    return None if block.no_op else hf.num_attention_heads // block.n_heads_in_group


def _ffn_size(hf: Any, layer: int) -> int | None:
    block = hf.block_configs[layer].ffn
    for name in ("replace_with_linear", "sparsify"):
        _refuse(hf, layer, "ffn", name)
    if block.no_op:
        return None
    if block.get("intermediate_size"):
        return block.intermediate_size
    size = int(2 * block.ffn_mult * hf.hidden_size / 3)
    return size + -size % 256


def _refuse(hf: Any, layer: int, part: str, name: str) -> None:
    if value := hf.block_configs[layer][part].get(name):
        raise UnsupportedModelError(f"{hf.architectures[0]}: block_configs[{layer}].{part}.{name}={value!r} is not supported")
