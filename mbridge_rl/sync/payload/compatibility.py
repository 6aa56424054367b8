"""Checks, before any weight moves, that the engine's model is the one that the trainer's bridge describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbridge_rl.core.errors import EngineMismatch

# Summary key -> the names that configs use for it. Only fields that change weights or logits; a field that both sides lack is
# equal.
_FIELDS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "hidden_act": ("hidden_act", "hidden_activation"),
    "rms_norm_eps": ("rms_norm_eps",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok",),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "norm_topk_prob": ("norm_topk_prob",),
}
_ABOUT_TYING = (
    ". tie_word_embeddings says whether a side has an output layer of its own. vLLM makes one if the checkpoint has an "
    "lm_head.weight that differs from the embedding, and also if it cannot compare the two because they are on different "
    "pipeline stages. Save the trainer's model with save_pretrained, and start the engine from that checkpoint"
)
_ROPE_FIELDS = ("rope_type", "rope_theta", "factor")


def config_summary(hf_config: Any, *, tied: bool | None = None) -> dict[str, Any]:
    """The fields of a Transformers config that both ends must agree on, as plain JSON types.

    Of a multimodal config only the text part is read.

    Args:
        hf_config: the Transformers config.
        tied: whether the model that was built has one tensor for embedding and output layer; `None` takes it from the config.
    """
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    summary: dict[str, Any] = {"architecture": (getattr(hf_config, "architectures", None) or [None])[0]}
    for key, names in _FIELDS.items():
        summary[key] = next((value for name in names if (value := getattr(text, name, None)) is not None), None)
    if summary["head_dim"] is None and summary["hidden_size"] and summary["num_attention_heads"]:
        summary["head_dim"] = summary["hidden_size"] // summary["num_attention_heads"]
    rope = getattr(text, "rope_parameters", None) or {}
    for name in _ROPE_FIELDS:
        value = rope.get(name) if isinstance(rope, Mapping) else None
        summary[name] = getattr(text, name, None) if value is None else value
    if tied is not None:
        summary["tie_word_embeddings"] = tied
    return {key: value for key, value in summary.items() if value is not None}


def require_same_config(trainer: Mapping[str, Any], engine_hf_config: Any, *, tied: bool | None = None) -> None:
    """Compares the trainer's `config_summary` with the engine's own.

    Args:
        trainer: the trainer's `config_summary`.
        engine_hf_config: the config that the engine was started with, not the one that it derived from it.
        tied: whether the engine's model is tied, as in `config_summary`.

    Raises:
        EngineMismatch: naming every field that differs, with both values.
    """
    engine = config_summary(engine_hf_config, tied=tied)
    differences = [
        f"{key}: the trainer has {trainer.get(key)!r}, the engine {engine.get(key)!r}"
        for key in sorted(trainer.keys() | engine.keys())
        if trainer.get(key) != engine.get(key)
    ]
    if differences:
        raise EngineMismatch(
            "the engine's model config is not the trainer's; start the engine from the trainer's checkpoint. "
            + "; ".join(differences)
            + (_ABOUT_TYING if trainer.get("tie_word_embeddings") != engine.get("tie_word_embeddings") else "")
        )
