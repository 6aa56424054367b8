"""DeepSeek-V3, R1 and Kimi-K2: latent attention, a few dense layers, then sigmoid-routed experts with a shared one.

Multi-token-prediction layers (`model.layers.{num_layers}` and on) are not built: RL trains the next-token head, and none of the
reference implementations loads them. A checkpoint may hold them; they are left where they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mbridge_rl.bridges.blocks import decoder, gated_mlp
from mbridge_rl.bridges.experts import sigmoid_mixture_of_experts
from mbridge_rl.bridges.latent_attention import latent_attention
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.rules import Rule

# What a prediction layer holds besides an ordinary layer.
_PREDICTION_TENSORS = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")


def deepseek_v3(hf: Any) -> ModelSpec:
    dense = tuple(range(min(hf.first_k_dense_replace, hf.num_hidden_layers)))
    sparse = tuple(range(len(dense), hf.num_hidden_layers))
    attention, experts = latent_attention(hf), sigmoid_mixture_of_experts(hf, sparse)
    spec = decoder(hf, attention, gated_mlp(hf).only_in(dense), experts)
    ignored = _prediction_layer_names(hf, (*attention.rules, *experts.rules))
    return replace(spec, ignored_hf_names=(*spec.ignored_hf_names, *ignored))


def _prediction_layer_names(hf: Any, layer_rules: tuple[Rule, ...]) -> list[str]:
    """Tensors of the multi-token-prediction layers that a checkpoint may hold."""
    names = []
    for layer in range(hf.num_hidden_layers, hf.num_hidden_layers + (getattr(hf, "num_nextn_predict_layers", None) or 0)):
        names += [f"model.layers.{layer}.{name}.weight" for name in _PREDICTION_TENSORS]
        for part in (part for rule in layer_rules for part in rule.parts):
            experts = range(hf.n_routed_experts) if "{expert}" in part.hf_name else [None]
            names += [part.hf_name.format(layer=layer, expert=expert) for expert in experts]
    return names
