"""Llama-Nemotron (DeciLM, found by Puzzle, arXiv 2411.19146): Llama whose layers differ in the number of KV heads and the size
of the MLP, or lack attention or MLP."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import Block, attention, decoder, gated_mlp
from mbridge_rl.core.config_fields import check_value
from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.core.model import ModelSpec


def nemotron_nas(hf: ConfigReader) -> ModelSpec:
    if len(hf.block_configs) != hf.num_hidden_layers:
        raise CheckpointError(
            f"{hf.architecture}: block_configs has {len(hf.block_configs)} entries; expected "
            f"num_hidden_layers={hf.num_hidden_layers}"
        )
    hf.ignore("num_key_value_heads", "intermediate_size")
    heads = [_kv_heads(hf, layer) for layer in range(hf.num_hidden_layers)]
    widths = [_ffn_size(hf, layer) for layer in range(hf.num_hidden_layers)]
    layers = [
        {"attention": {"num_query_groups": kv, "no_op": kv is None}, "mlp": {"ffn_hidden_size": f, "no_op": f is None}}
        for kv, f in zip(heads, widths, strict=True)
    ]
    sizes = Block({"heterogeneous_layers_config_encoded_json": json.dumps({"block_configs": layers})})
    attentions = _by_size(hf, attention, "num_key_value_heads", heads)
    return decoder(hf, *attentions, *_by_size(hf, gated_mlp, "intermediate_size", widths), sizes)


def _by_size(hf: ConfigReader, block: Callable[[ConfigReader], Block], field: str, sizes: list[int | None]) -> list[Block]:
    """The block in each of its sizes, in the layers with that size."""
    blocks = []
    for size in sorted({size for size in sizes if size is not None}):
        layers = tuple(layer for layer, layer_size in enumerate(sizes) if layer_size == size)
        blocks.append(block(hf.with_values(**{field: size})).only_in(layers))
    return blocks


def _kv_heads(hf: ConfigReader, layer: int) -> int | None:
    block = _part(hf, layer, "attention", ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens"))
    if block.get("no_op"):
        return None
    group = block.get("n_heads_in_group")
    if not isinstance(group, int) or group < 1 or hf.num_attention_heads % group:
        raise CheckpointError(
            f"{hf.architecture}: block_configs[{layer}].attention.n_heads_in_group={group!r}; expected a divisor of "
            f"num_attention_heads={hf.num_attention_heads}"
        )
    return hf.num_attention_heads // group


def _ffn_size(hf: ConfigReader, layer: int) -> int | None:
    block = _part(hf, layer, "ffn", ("replace_with_linear", "sparsify"))
    if block.get("no_op"):
        return None
    if size := block.get("intermediate_size"):
        check_value("intermediate_size", size, f"{hf.architecture}: block_configs[{layer}].ffn.")
        return size
    factor = block.get("ffn_mult")
    if not isinstance(factor, int | float) or not 0 < factor < 1024:
        raise CheckpointError(f"{hf.architecture}: block_configs[{layer}].ffn.ffn_mult={factor!r}; expected a positive number")
    size = int(2 * factor * hf.hidden_size / 3)
    return size + -size % 256


def _part(hf: ConfigReader, layer: int, name: str, refused: tuple[str, ...]) -> Mapping[str, Any]:
    """The entry of `block_configs` for a layer's attention or MLP."""
    part = hf.block_configs[layer].get(name)
    if not isinstance(part, Mapping):
        raise CheckpointError(f"{hf.architecture}: block_configs[{layer}].{name}={part!r}; expected an object")
    for field in refused:
        if part.get(field):
            raise hf.refuse(f"block_configs[{layer}].{name}.{field}", f"{part[field]!r} is not supported")
    return part
