"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437): layers after the last that predict the tokens after the next.

They are not built: RL trains the next-token head. A checkpoint may hold them; they are left where they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mbridge_rl.bridges.blocks import HF_LAYER
from mbridge_rl.core.model import ModelSpec


def without_prediction(hf: Any, spec: ModelSpec) -> ModelSpec:
    """The same model, of whose checkpoints the prediction layers are ignored."""
    layers = range(hf.num_hidden_layers, hf.num_hidden_layers + (getattr(hf, "num_mtp_layers", None) or 0))
    ignored = (f"{HF_LAYER.format(layer=layer)}." for layer in layers)
    return replace(spec, ignored_hf_prefixes=(*spec.ignored_hf_prefixes, *ignored))
