"""MiniMax-M2: queries and keys are normalised over their whole projection, positions are half-rotary; sigmoid-routed experts in
every layer, chosen with a bias."""

from dataclasses import replace

from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import HF_LAYER, attention, decoder, projection_norms
from mbridge_rl.bridges.blocks.experts import MIXTRAL_NAMES, gated_experts
from mbridge_rl.core.extras import Routing
from mbridge_rl.core.model import ModelSpec


def minimax_m2(hf: ConfigReader) -> ModelSpec:
    for name, expected in _FIXED.items():
        hf.require(name, expected)
    hf.ignore("rotary_dim")  # Transformers' class has put it into rope_parameters
    layers, experts = tuple(range(hf.num_hidden_layers)), hf.num_local_experts
    routed = gated_experts(
        hf,
        layers,
        Routing("sigmoid"),
        experts=experts,
        ffn=hf.intermediate_size,
        names=MIXTRAL_NAMES,
        bias_shape=(experts,),
        fp32_router=True,
    )
    spec = decoder(hf, attention(hf), projection_norms(hf), routed, partial_rotation=True)
    # Prediction layers are ignored, since no implementation shows their form.
    modules = range(hf.num_hidden_layers, hf.num_hidden_layers + (hf.undeclared("num_mtp_modules") or 0))
    ignored = (f"{HF_LAYER.format(layer=layer)}." for layer in modules)
    return replace(spec, ignored_hf_prefixes=(*spec.ignored_hf_prefixes, *ignored))


# Fields of the released config.json that are fixed in Transformers' model.
_FIXED = {"use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_routing_bias": True}
