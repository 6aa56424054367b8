"""DeepSeek-V3 and Kimi-K2: latent attention with and without low-rank queries, YaRN, sigmoid and group-limited routing."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_models import TINY, VARIANTS, YARN, checkpoint, config
from ranks import run_ranks
from tiny import assert_same_state, hf_state
from tolerance import assert_near, forward
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import model_spec
from mbridge_rl.core.errors import LayoutError, StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.segments import megatron_side
from mbridge_rl.hf.config import load_config
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel

ROUNDING = forward(TINY["num_hidden_layers"], TINY["intermediate_size"])
LAYOUTS = {
    "1": ParallelLayout(),
    "tp2+sp": ParallelLayout(tp=2),
    "ep2": ParallelLayout(ep=2, dp=2),
    "pp2-uneven": ParallelLayout(pp=2, stage_layers=(3, 2)),
    "tp2xep2xetp1xpp2": ParallelLayout(tp=2, ep=2, etp=1, pp=2, stage_layers=(2, 3)),
}


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


FIELDS = {
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "beta_fast": 4,
    "beta_slow": 4,
    "rotary_scaling_factor": 20.0,
    "original_max_position_embeddings": 300,
    "rotary_base": 15000.0,
    "moe_router_topk_scaling_factor": 2.4,
    "moe_router_group_topk": 4,
}


def logits_with(rank: int, directory: Path, tokens: Tensor, changes: list[dict[str, Any]]) -> list[Tensor | None]:
    layout = initialize_parallel(ParallelLayout())
    bridge, logits = AutoBridge.from_pretrained(directory), []
    for change in changes:
        bridge.spec = replace(bridge.spec, transformer_config={**bridge.spec.transformer_config, **change})
        model = bridge.build_model(layout)
        bridge.load_weights(model)
        logits.append(forward_logits(model, tokens))
        bridge = AutoBridge.from_pretrained(directory)
    return logits


def test_every_translated_field_matters(tmp_path: Path) -> None:
    """Or the comparison of logits would prove nothing about it."""
    checkpoint(tmp_path, "v3")
    tokens = torch.randint(0, 515, (2, 48), generator=torch.Generator().manual_seed(0))
    changes = [{}, *({name: value} for name, value in FIELDS.items())]
    right, *others = run_ranks(logits_with, 1, tmp_path, tokens, changes)[0]
    for name, other in zip(FIELDS, others, strict=True):
        assert (other - right).abs().max() > 3 * ROUNDING * right.abs().max(), name


def there_and_back(
    rank: int, directory: Path, layout: ParallelLayout, tokens: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
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
    tokens = torch.randint(0, 515, (2, 48), generator=torch.Generator().manual_seed(0))
    ranks = run_ranks(there_and_back, LAYOUTS[layout].world_size, tmp_path, LAYOUTS[layout], tokens)
    with torch.no_grad():
        wanted = reference(tokens).logits
    for exported, logits in ranks:
        assert_same_state(exported, hf_state(tmp_path))
        if logits is not None:
            assert_near(logits, wanted, ROUNDING, what="logits")
    assert ranks[-1][1] is not None


def biases(rank: int, directory: Path) -> tuple[dict[str, torch.dtype], dict[str, Tensor]]:
    layout = initialize_parallel(ParallelLayout())
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, dtype=torch.bfloat16)
    bridge.load_weights(model)
    live = {name: buffer.dtype for name, buffer in model[0].named_buffers() if name.endswith("expert_bias")}
    return live, dict(bridge.export_weights(model))


def test_expert_biases_stay_fp32_in_a_bf16_model(tmp_path: Path) -> None:
    """Megatron casts them with everything else when the model is built, and back at its first step; weights come between."""
    checkpoint(tmp_path, "v3")
    live, exported = run_ranks(biases, 1, tmp_path)[0]
    assert set(live.values()) == {torch.float32}
    for hf_name, tensor in hf_state(tmp_path).items():
        bias = hf_name.endswith("e_score_correction_bias")
        assert exported[hf_name].dtype == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(exported[hf_name], tensor if bias else tensor.bfloat16())


def test_prediction_layers_are_left_where_they_are(tmp_path: Path) -> None:
    """A checkpoint may hold them, if the config says so; anything else beyond the last layer is an error."""
    checkpoint(tmp_path, "v3")
    state, bridge = hf_state(tmp_path), AutoBridge.from_pretrained(tmp_path)
    names = [
        "eh_proj.weight",
        "enorm.weight",
        "shared_head.head.weight",
        "mlp.experts.7.up_proj.weight",
        "self_attn.o_proj.weight",
    ]
    extra = {f"model.layers.5.{name}": torch.zeros(3) for name in [*names, "mlp.gate.e_score_correction_bias"]}
    assert not extra.keys() & bridge.shard(state | extra, ParallelLayout())[0].keys()
    with pytest.raises(StateMismatchError, match=r"unexpected model.layers.6.enorm.weight"):
        bridge.shard(state | {"model.layers.6.enorm.weight": torch.zeros(3)}, ParallelLayout())
    without = AutoBridge.from_config(config("v3", num_nextn_predict_layers=0))
    with pytest.raises(StateMismatchError, match=r"unexpected model\.layers\.5"):
        without.shard(state | extra, ParallelLayout())


def test_heads_are_not_cut() -> None:
    """8 heads of 28 rows divide by 16 as numbers, not as heads."""
    spec = model_spec(config("v3", intermediate_size=144))
    with pytest.raises(LayoutError, match="8 attention heads do not divide by tp=16"):
        megatron_side(spec, ParallelLayout(tp=16, etp=1))


def test_kimis_config_needs_no_code_of_its_repository(tmp_path: Path) -> None:
    checkpoint(tmp_path, "kimi")
    path = tmp_path / "config.json"
    changes = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    loaded = load_config(tmp_path)
    assert loaded.model_type == "deepseek_v3"
    assert not hasattr(loaded, "auto_map")
    assert model_spec(loaded).fingerprint == model_spec(config("kimi")).fingerprint


def test_moonlights_config_is_read_without_its_repositorys_code(tmp_path: Path) -> None:
    """Its config.json, in the fields and the spelling of its release."""
    released = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
    }
    shrunk = {name: value for name, value in TINY.items() if name not in (*released, "rope_parameters")}
    (tmp_path / "config.json").write_text(json.dumps({**shrunk, "n_group": 1, "topk_group": 1, **released}))
    spec = AutoBridge.from_pretrained(tmp_path).spec
    assert spec.transformer_config["rotary_base"] == 50000.0
    assert spec.transformer_config["layernorm_epsilon"] == 1e-05
    assert "decoder.layers.0.self_attention.linear_q_proj.weight" in {tensor.megatron_name for tensor in spec.instances}
    assert spec.prediction is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"rope_parameters": {**YARN, "mscale": None}}, "mscale_all_dim but no mscale"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope type 'linear'"),
    ],
)
def test_what_megatron_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        model_spec(config("v3", **changes))
