"""Makes a published config.json small enough for a test: layers, widths, experts, vocabulary and positions. All else stays.

    python tests/support/published/shrink.py config.json > tests/data/published/OWNER--NAME.json

What decides between two ways to compute stays what it was: queries per key head (up to 8), heads that are not the hidden size
cut evenly, every kind of layer, dense layers before sparse ones, groups of experts, windows and lengths in proportion, fields
that are absent, null or without effect.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 263  # odd, as Megatron and vLLM pad it
LENGTH = 16  # of the shortest window or length at which rotary positions change
WIDTH, EXPERT_WIDTH = 96, 32
HEAD_DIVISOR = 4  # of everything that is counted in channels of a head
FEWEST_LAYERS, MOST_LAYERS = 3, 10

_LENGTHS = ("sliding_window", "original_max_position_embeddings", "initial_context_length")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k")
_HEAD_CHANNELS = (
    "head_dim",
    "attention_head_dim",
    "kv_channels",
    "rotary_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "qk_head_dim",
    "v_head_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
# Sizes that no other follows from.
_FIXED = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "ssm_state_size": 16,
    "mamba_d_state": 16,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "moe_latent_size": 32,
    "mm_tokens_per_image": 4,
}
_VISION = {
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 4,
    "spatial_patch_size": 4,
    "image_size": 16,
    "window_size": 32,
    "num_position_embeddings": 16,
}


def shrink(published: Mapping[str, Any], parsed: Any) -> dict[str, Any]:
    """The small config.

    Args:
        parsed: Transformers' config object of `published`, which knows what absent fields are.
    """
    small = {name: value for name, value in published.items() if name not in ("text_config", "vision_config")}
    text = getattr(parsed, "text_config", parsed)
    if "text_config" in published:
        small["text_config"] = _language(published["text_config"], text)
        if "num_hidden_layers" in small:  # written twice, as Transformers 4 saved some models
            small = _language(small, text)
    else:
        small = _language(small, text)
    language = small.get("text_config", small)
    if isinstance(published.get("vision_config"), Mapping):
        small["vision_config"] = _vision(published["vision_config"], language["hidden_size"])
    small |= {name: _FIXED[name] for name in small.keys() & _FIXED.keys() if isinstance(small[name], int)}
    return _with_tokens(small, language["vocab_size"], {})


def _language(published: Mapping[str, Any], parsed: Any) -> dict[str, Any]:
    given = {**published, **_absent(published, parsed)}
    small = dict(given)
    layers = _layers(given, parsed)
    small |= _heads(given, parsed)
    small |= _widths(given)
    small |= _experts(given)
    small |= _mamba(given)
    small |= _delta_net(given)
    small |= {name: _FIXED[name] for name in given.keys() & _FIXED.keys() if isinstance(given[name], int)}
    small |= {name: given[name] // HEAD_DIVISOR for name in _HEAD_CHANNELS if isinstance(given.get(name), int)}
    small |= _lengths(given)
    small |= _per_layer(given, layers)
    small["vocab_size"] = VOCABULARY
    return small


def _absent(published: Mapping[str, Any], parsed: Any) -> dict[str, Any]:
    """Sizes that only the config's class says, where they do not follow from others."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    absent = {name: getattr(parsed, name) for name in names if name not in published and getattr(parsed, name, None)}
    heads = absent.get("num_attention_heads", published.get("num_attention_heads"))
    hidden = absent.get("hidden_size", published.get("hidden_size"))
    for name, follows in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
        if name not in published and getattr(parsed, name, None) not in (None, follows):
            absent[name] = getattr(parsed, name)
    for name in ("sliding_window", *_EXPERTS, "moe_intermediate_size"):
        if name not in published and isinstance(getattr(parsed, name, None), int) and name not in _aliases(parsed):
            absent[name] = getattr(parsed, name)
    return absent


def _aliases(parsed: Any) -> Iterable[str]:
    return getattr(parsed, "attribute_map", {}).keys()


def _layers(given: Mapping[str, Any], parsed: Any) -> list[int]:
    """Which of the published layers stay: a stretch that has every kind. It begins with the first where the kind of a layer
    follows from its index."""
    count = len(given.get("hybrid_override_pattern") or range(given["num_hidden_layers"]))
    lists = [_hashable(value) for value in given.values() if isinstance(value, list | str) and len(value) == count > 1]
    computed = [getattr(parsed, name, None) for name in ("layer_types", "mlp_layer_types", "layers_block_type")]
    lists += [value for value in computed if isinstance(value, list) and len(value) == count]
    kinds = [(tuple(values[layer] for values in lists), _kind_by_index(given, layer)) for layer in range(count)]
    by_index = any(_kind_by_index(given, layer) != _kind_by_index(given, 0) for layer in range(count)) or not any(
        isinstance(value, list | str) and len(value) == count > 1 for value in given.values()
    )
    wanted = set(kinds)
    for size in range(min(FEWEST_LAYERS, count), MOST_LAYERS + 1):
        for start in range(1 if by_index else count - size + 1):
            if set(kinds[start : start + size]) == wanted:
                return list(range(start, start + size))
    return [kinds.index(kind) for kind in dict.fromkeys(kinds)]


def _hashable(values: list[Any] | str) -> list[str]:
    return [json.dumps(value, sort_keys=True) for value in values]


def _kind_by_index(given: Mapping[str, Any], layer: int) -> tuple[bool, ...]:
    first, last = given.get("moe_layer_start_index"), given.get("moe_layer_end_index")
    last = given["num_hidden_layers"] - 1 if last in (None, -1) else last
    return (
        layer < (given.get("first_k_dense_replace") or 0),
        layer in (given.get("mlp_only_layers") or ()),
        first is not None and first <= layer <= last,
    )


def _per_layer(given: Mapping[str, Any], layers: list[int]) -> dict[str, Any]:
    count = len(given.get("hybrid_override_pattern") or range(given["num_hidden_layers"]))
    small: dict[str, Any] = {"num_hidden_layers": len(layers)}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == count > 1:
            small[name] = [value[layer] for layer in layers]
    if pattern := given.get("hybrid_override_pattern"):
        small["hybrid_override_pattern"] = "".join(pattern[layer] for layer in layers)
    if windowed := given.get("max_window_layers"):
        small["max_window_layers"] = -(-windowed * len(layers) // count)
    if given.get("moe_layer_end_index") not in (None, -1):
        small["moe_layer_end_index"] = min(given["moe_layer_end_index"], len(layers) - 1)
    return small


def _heads(given: Mapping[str, Any], parsed: Any) -> dict[str, Any]:
    heads, kv_heads = given["num_attention_heads"], given.get("num_key_value_heads") or given["num_attention_heads"]
    ratio = heads // kv_heads
    if given.get("block_configs"):  # each layer says how many queries share a key head
        ratio = max(block["attention"].get("n_heads_in_group") or 1 for block in given["block_configs"])
    ratio = ratio if ratio <= 8 else ratio // 2
    kv_heads = 1 if kv_heads == 1 else 4 if ratio == 1 else 2
    small = {"num_attention_heads": kv_heads * ratio}
    if given.get("num_key_value_heads"):
        small["num_key_value_heads"] = kv_heads
    published_dim = given.get("head_dim") or given.get("attention_head_dim") or given["hidden_size"] // heads
    even = kv_heads * ratio * (published_dim // HEAD_DIVISOR)
    uneven = 64 if even != 64 else 96
    latent = given.get("kv_lora_rank")
    small["hidden_size"] = even if heads * published_dim == given["hidden_size"] and not latent else uneven
    return small


def _widths(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inner sizes of MLPs and experts. A multiple of the experts' stays that multiple."""
    small, expert = {}, given.get("moe_intermediate_size")
    if isinstance(expert, int):
        small["moe_intermediate_size"] = EXPERT_WIDTH
    for name in ("intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"):
        if isinstance(given.get(name), int):
            shared = expert and (name != "intermediate_size" or given[name] == expert)
            small[name] = EXPERT_WIDTH * max(1, round(given[name] / expert)) if shared else WIDTH
    return small


def _experts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Half as many again as are chosen, and some; three in every group."""
    chosen = next((given[name] for name in _CHOSEN if given.get(name)), None)
    groups = given.get("n_group") or 1
    if chosen is None:
        return {}
    count = groups * 3 if groups > 1 else chosen + chosen // 2 + 2
    return {name: min(count, given[name]) for name in _EXPERTS if isinstance(given.get(name), int)}


def _mamba(given: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for heads, dim, groups in (
        ("mamba_num_heads", "mamba_head_dim", "n_groups"),
        ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ):
        if heads in given:
            small |= {heads: 8, dim: given[dim] // 8, groups: min(given[groups], 2)}
            if given.get("mamba_d_ssm"):
                small["mamba_d_ssm"] = 8 * (given[dim] // 8)
    return small


def _delta_net(given: Mapping[str, Any]) -> dict[str, Any]:
    if not given.get("linear_num_key_heads"):
        return {}
    ratio = given["linear_num_value_heads"] // given["linear_num_key_heads"]
    return {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * ratio}


def _lengths(given: Mapping[str, Any]) -> dict[str, Any]:
    """Windows and lengths in proportion, the shortest being `LENGTH`; and lists of rotary frequencies, thinned out."""
    scalings = {name: given[name] for name in ("rope_scaling", "rope_parameters") if isinstance(given.get(name), Mapping)}
    scaled = [scaling.get("original_max_position_embeddings") for scaling in scalings.values()]
    lengths = [length for length in (*(given.get(name) for name in _LENGTHS), *scaled) if isinstance(length, int)]
    shortest = min(lengths, default=given["max_position_embeddings"])
    small: dict[str, Any] = {
        name: max(1, round(given[name] * LENGTH / shortest)) for name in _LENGTHS if isinstance(given.get(name), int)
    }
    small["max_position_embeddings"] = max(4 * LENGTH, round(given["max_position_embeddings"] * LENGTH / shortest))
    return small | {name: _scaling(scaling, shortest) for name, scaling in scalings.items()}


def _scaling(published: Mapping[str, Any], shortest: int) -> dict[str, Any]:
    small = dict(published)
    for name, value in published.items():
        if isinstance(value, Mapping):
            small[name] = _scaling(value, shortest)
        elif name == "original_max_position_embeddings":
            small[name] = round(value * LENGTH / shortest)
        elif name in ("short_factor", "long_factor"):
            small[name] = value[::HEAD_DIVISOR]
        elif name == "mrope_section":
            small[name] = _sections(value)
    return small


def _sections(published: list[int]) -> list[int]:
    """Channels of the three coordinates; together they stay all that are rotated."""
    total = sum(published) // HEAD_DIVISOR
    sections = [section // HEAD_DIVISOR for section in published]
    for place in range(total - sum(sections)):
        sections[place] += 1
    return sections


def _vision(published: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    small = {**published, **{name: size for name, size in _VISION.items() if name in published}}
    if "out_hidden_size" in published:
        small["out_hidden_size"] = hidden
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if name in published:
            small[name] = list(range(min(len(published[name]), _VISION["depth"])))
    return small


def _with_tokens(config: Mapping[str, Any], vocabulary: int, moved: dict[int, int]) -> dict[str, Any]:
    """Ids of tokens beyond the vocabulary become its last ones, one each."""

    def within(value: Any) -> Any:
        if isinstance(value, list):
            return [within(one) for one in value]
        if not isinstance(value, int) or value < vocabulary // 2:
            return value
        return moved.setdefault(value, vocabulary - 1 - len(moved))

    small = dict(config)
    for name, value in config.items():
        if isinstance(value, Mapping):
            small[name] = _with_tokens(value, vocabulary, moved)
        elif name.endswith(("_token_id", "_token_index")):
            small[name] = within(value)
    return small


if __name__ == "__main__":
    from mbridge_rl.hf.config import parse_config

    published = json.loads(Path(sys.argv[1]).read_text())
    json.dump(shrink(published, parse_config(published)), sys.stdout, indent=1)
    sys.stdout.write("\n")
