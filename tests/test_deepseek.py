"""DeepSeek-V3 and Kimi-K2: latent attention with and without low-rank queries, YaRN, sigmoid and group-limited routing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import DENSE, assert_same_state, hf_state
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import model_spec
from mbridge_rl.core.errors import LayoutError, StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.hf.config import load_config
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel

# fp32: both sides compute the same sums in other orders. Seen here: below 1e-5 for logits of order 1.
LOGITS_TOLERANCE = 1e-4

TINY = {
    **DENSE,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 24,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "v3": {"rope_parameters": YARN},
    "kimi": {"rope_parameters": {**YARN, "beta_fast": 1, "mscale": 1.0}, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
    "full-rank-queries": {"q_lora_rank": None},
    "yarn-without-mscale": {"rope_parameters": {name: YARN[name] for name in YARN if "mscale" not in name}},
}
LAYOUTS = {
    "1": ParallelLayout(),
    "tp2+sp": ParallelLayout(tp=2),
    "ep2": ParallelLayout(ep=2, dp=2),
    "pp2-uneven": ParallelLayout(pp=2, stage_layers=(3, 2)),
    "tp2xep2xetp1xpp2": ParallelLayout(tp=2, ep=2, etp=1, pp=2, stage_layers=(2, 3)),
}


def config(variant: str, **changes: Any) -> Any:
    from transformers import DeepseekV3Config

    made = DeepseekV3Config(**{**TINY, **VARIANTS[variant], **changes})
    made.architectures = ["DeepseekV3ForCausalLM"]
    return made


def checkpoint(directory: Path, variant: str) -> nn.Module:
    """Random in every tensor, expert biases included, which decide the routing."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(config(variant)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            if "inv_freq" not in name:
                tensor.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.5 if "embed" in name else 0.1))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_on_virtual_ranks(variant: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, variant)
    bridge, expected = AutoBridge.from_pretrained(tmp_path), hf_state(tmp_path)
    layouts = [
        ParallelLayout(tp=tp, pp=pp, ep=ep, etp=etp, dp=max(1, ep * etp // tp), stage_layers={1: None, 2: (2, 3)}[pp])
        for tp, pp, ep, etp in itertools.product((1, 2, 4), (1, 2), (1, 2, 4), (1, 2))
    ]
    for layout in [*layouts, ParallelLayout(tp=8), ParallelLayout(pp=2, vpp=2, stage_layers=(2, 1, 1, 1))]:
        assert_same_state(bridge.unshard(bridge.shard(expected, layout), layout), expected)


def there_and_back(rank: int, directory: Path, layout: ParallelLayout, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    return dict(bridge.export_weights(model)), forward_logits(model, tokens)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("v3", name) for name in LAYOUTS] + [(name, "tp2xep2xetp1xpp2") for name in VARIANTS if name != "v3"],
)
def test_real_ranks(variant: str, layout: str, tmp_path: Path) -> None:
    """Exports are the checkpoint bit for bit, and logits are Transformers'."""
    reference = checkpoint(tmp_path, variant)
    tokens = torch.randint(0, 515, (2, 48), generator=torch.Generator().manual_seed(0))  # beyond YaRN's original 32 positions
    ranks = run_ranks(there_and_back, LAYOUTS[layout].world_size, tmp_path, LAYOUTS[layout], tokens)
    with torch.no_grad():
        wanted = reference(tokens).logits
    for exported, found in ranks:
        assert_same_state(exported, hf_state(tmp_path))
        assert found is None or (found - wanted).abs().max() < LOGITS_TOLERANCE
    assert ranks[-1][1] is not None
