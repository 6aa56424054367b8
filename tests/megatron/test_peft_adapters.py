"""Adapters that PEFT made act alike here, and adapters made here load in PEFT; those that do not fit are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import deepseek_models
import pytest
import torch
from adapter_patterns import BUT_DENSE, EXPERTS, LATENT, PATTERNS, ROUNDING, SHARED
from ranks import RankError, run_ranks
from safetensors.torch import load_file, save_file
from tiny import assert_same_state, tiny_model
from tolerance import assert_near
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import PEFT_PREFIX
from mbridge_rl.core.errors import CheckpointError, StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.hf.peft import ADAPTER_CONFIG, ADAPTER_FILE, read_lora_config
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.lora.attach import adapted_modules, adapters_disabled, add_lora
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

# Files, with real Megatron and the real `peft`.


@cache
def _base(scratch: Path, family: str) -> Path:
    if family == "deepseek":
        deepseek_models.checkpoint(scratch / family, "v3")
    else:
        tiny_model(family).save_pretrained(scratch / family)
    return scratch / family


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def _tokens() -> Tensor:
    return torch.randint(2, 515, (2, 12), generator=torch.Generator().manual_seed(4))


def _peft_adapter(base: Path, directory: Path, **options: Any) -> Tensor:
    """An adapter that `peft` made, random in every factor, saved by `peft`; its logits `[batch, seq, vocab]`."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **options),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                random = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(parameter * (1 + random) if "magnitude" in name else random)
        logits = model.eval()(_tokens()).logits
    model.save_pretrained(directory, save_embedding_layers=False)
    return logits


def _logits_of_peft(base: Path, directory: Path) -> Tensor:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        return model(_tokens()).logits


def _attached(base: Path, layout: ParallelLayout, config: LoRAConfig) -> tuple[AutoBridge, list[nn.Module]]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(base)
    model = bridge.build_model(layout)
    bridge.load_weights(model)
    add_lora(model, config)
    return bridge, model


def _load_and_save(rank: int, base: Path, adapter: Path, layout: ParallelLayout, saved: Path) -> tuple[Any, dict[str, Tensor]]:
    bridge, model = _attached(base, layout, AutoBridge.from_pretrained(base).adapter_config(adapter))
    with adapters_disabled(model):
        before = forward_logits(model, _tokens())
    bridge.load_adapter(model, adapter)
    bridge.save_adapter(model, saved)
    after = forward_logits(model, _tokens())
    if after is not None:
        assert (after - before).abs().max() > 0.1
    return after, dict(bridge.export_adapter_weights(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("qwen2", ParallelLayout(tp=2), {"target_modules": "all-linear"}),
        ("qwen2", ParallelLayout(tp=2, pp=2), {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("qwen2", ParallelLayout(pp=2, vpp=2), {"target_modules": r".*\.(gate_proj|o_proj)"}),
        ("qwen3-moe", ParallelLayout(tp=2, ep=2, etp=1), {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
        ("deepseek", ParallelLayout(tp=2), {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]}),
        ("qwen2", ParallelLayout(tp=2), {"target_modules": "all-linear", "use_dora": True}),
        ("deepseek", ParallelLayout(tp=2), {"target_modules": ["q_a_proj", "kv_b_proj", "o_proj"], "use_dora": True}),
        ("qwen3-moe", ParallelLayout(tp=2), {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
        ("qwen3-moe", ParallelLayout(ep=2, dp=2), {"target_modules": [], "target_parameters": ["down_proj"]}),
        ("mixtral", ParallelLayout(tp=2), {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
        ("qwen2", ParallelLayout(tp=2), {"target_modules": "all-linear", **PATTERNS}),
        ("qwen2", ParallelLayout(tp=2, pp=2), {"target_modules": ["v_proj", "lm_head"], "rank_pattern": {"lm_head": 5}}),
        (
            "qwen2",
            ParallelLayout(tp=2, pp=2),
            {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, **PATTERNS},
        ),
        (
            "qwen3-moe",
            ParallelLayout(tp=2, ep=2, etp=1),
            {"target_modules": ["o_proj"], "target_parameters": EXPERTS, "rank_pattern": {"gate_up_proj": 6, "o_proj": 2}},
        ),
    ],
    ids=str,
)
def test_adapters_of_peft_load_act_alike_and_come_back(
    family: str, layout: ParallelLayout, options: dict[str, Any], scratch: Path, tmp_path: Path
) -> None:
    base = _base(scratch, family)
    expected = _peft_adapter(base, tmp_path / "peft", **options)
    made = load_file(tmp_path / "peft" / ADAPTER_FILE)
    ranks = run_ranks(_load_and_save, layout.world_size, base, tmp_path / "peft", layout, tmp_path / "ours")
    for logits, exported in ranks:
        assert_same_state(exported, made)
        if logits is not None:
            assert_near(logits, expected, ROUNDING, what="logits")
    assert_same_state(load_file(tmp_path / "ours" / ADAPTER_FILE), made)
    assert torch.equal(_logits_of_peft(base, tmp_path / "ours"), expected)


def _train_and_save(rank: int, base: Path, adapter: Path, saved: Path) -> Tensor | None:
    bridge, model = _attached(base, ParallelLayout(tp=2), AutoBridge.from_pretrained(base).adapter_config(adapter))
    bridge.load_adapter(model, adapter)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-2))
    batch = Batch.from_completions(_tokens()[:, :4].tolist(), _tokens()[:, 4:].tolist(), pad_token_id=0)
    losses = [trainer.step(batch, supervised_loss).loss for _ in range(3)]
    assert losses[2] < losses[0]
    bridge.save_adapter(trainer.model, saved)
    return forward_logits(trainer.model, _tokens())


def test_dora_of_peft_trains_on_here_and_goes_back(scratch: Path, tmp_path: Path) -> None:
    base = _base(scratch, "qwen2")
    before = _peft_adapter(base, tmp_path / "peft", target_modules="all-linear", use_dora=True, use_rslora=True)
    trained = run_ranks(_train_and_save, 2, base, tmp_path / "peft", tmp_path / "ours")[0]
    assert (trained - before).abs().max() > 0.1
    assert_near(_logits_of_peft(base, tmp_path / "ours"), trained, ROUNDING, what="logits")


def _random_and_save(rank: int, base: Path, layout: ParallelLayout, config: LoRAConfig, saved: Path) -> Any:
    bridge, model = _attached(base, layout, config)
    generator = torch.Generator().manual_seed(6)
    for _, module in adapted_modules(model):
        # the same rows whatever the rank, so that replicas are equal
        row = torch.randn(8, generator=generator) * 0.2
        for name in module.adapter_parameter_names:
            if name.startswith("lora_b"):
                factor = getattr(module, name).data
                factor.copy_(row[: factor.shape[1]])
    bridge.save_adapter(model, saved)
    return forward_logits(model, _tokens())


@pytest.mark.parametrize(
    ("family", "layout", "config"),
    [
        ("qwen2", ParallelLayout(tp=2), SHARED),
        ("qwen2", ParallelLayout(tp=2, pp=2), LoRAConfig(rank=4, alpha=10.0, canonical=True, rslora=True)),
        ("qwen2", ParallelLayout(tp=2), LoRAConfig(rank=2, alpha=3.0, targets=("q_proj", "linear_fc2"))),
        ("deepseek", ParallelLayout(tp=2, ep=2, etp=1), LoRAConfig(rank=2, alpha=3.0, targets=LATENT)),
        ("qwen2", ParallelLayout(tp=2), LoRAConfig(rank=3, alpha=6.0, dora=True, rslora=True)),
        ("deepseek", ParallelLayout(tp=2, ep=2, etp=1), LoRAConfig(rank=2, alpha=3.0, targets=LATENT, dora=True)),
        ("qwen3-moe", ParallelLayout(tp=2), LoRAConfig(rank=3, alpha=6.0, targets=BUT_DENSE)),
        ("qwen3-moe", ParallelLayout(tp=2, ep=2, etp=1), LoRAConfig(rank=3, targets=BUT_DENSE, stacked_experts=True)),
        ("qwen2", ParallelLayout(tp=2), LoRAConfig(rank=2, alpha=3.0, rslora=True, start="pissa")),
        ("qwen2", ParallelLayout(tp=2, pp=2), LoRAConfig(rank=3, alpha=6.0, **PATTERNS)),
        ("deepseek", ParallelLayout(tp=2), LoRAConfig(rank=2, alpha=3.0, targets=("output_layer", "linear_kv_up_proj"))),
        (
            "qwen2",
            ParallelLayout(tp=2),
            LoRAConfig(rank=2, alpha=3.0, start="pissa", rank_pattern={"linear_qkv": 1, r".*\.3\.mlp\..*": 4}),
        ),
        (
            "qwen3-moe",
            ParallelLayout(tp=2),
            LoRAConfig(
                rank=3, alpha=6.0, targets=BUT_DENSE, rank_pattern={"linear_proj": 2}, alpha_pattern={r"layers\.1\..*": 3.0}
            ),
        ),
        ("qwen3-moe", ParallelLayout(tp=2), LoRAConfig(rank=2, targets=BUT_DENSE, stacked_experts=True, start="olora")),
        ("mixtral", ParallelLayout(tp=2, ep=2, etp=1), LoRAConfig(rank=3, targets=BUT_DENSE, stacked_experts=True)),
        ("mixtral", ParallelLayout(tp=2), LoRAConfig(rank=3, alpha=6.0, targets=BUT_DENSE)),
    ],
    ids=str,
)
def test_adapters_made_here_load_in_peft_with_equal_logits(
    family: str, layout: ParallelLayout, config: LoRAConfig, scratch: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    base = _base(scratch, family)
    ranks = run_ranks(_random_and_save, layout.world_size, base, layout, config, tmp_path / "ours")
    expected = _logits_of_peft(base, tmp_path / "ours")
    for logits in ranks:
        if logits is not None:
            assert_near(logits, expected, ROUNDING, what="logits")


def _load(rank: int, base: Path, config: LoRAConfig | None, adapter: Path) -> None:
    initialize_parallel(ParallelLayout())
    bridge = AutoBridge.from_pretrained(base)
    model = bridge.build_model()
    if config is not None:
        add_lora(model, config)
    before = [parameter.clone() for chunk in model for parameter in chunk.parameters()]
    try:
        bridge.load_adapter(model, adapter)
    finally:
        after = [parameter for chunk in model for parameter in chunk.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes(scratch: Path, tmp_path: Path) -> None:
    base = _base(scratch, "qwen2")
    adapter = tmp_path / "adapter"
    _peft_adapter(base, adapter, target_modules=["q_proj", "k_proj", "v_proj"])
    read_config = read_lora_config(AutoBridge.from_pretrained(base).spec, adapter)
    assert read_config == LoRAConfig(3, 7.0, ("q_proj", "k_proj", "v_proj"), canonical=True)

    def refused(message: str, config: LoRAConfig | None = read_config) -> None:
        with pytest.raises(RankError, match=message):
            run_ranks(_load, 1, base, config, adapter)

    refused("StateMismatchError: this model has no adapters", None)
    refused(r"lora_A\.weight is another than .*share one A.*canonical=True", LoRAConfig(3, 7.0, ("linear_qkv",)))
    refused("rank 3 and scale 2.33333, the model's adapters 3 and 2:", LoRAConfig(3, 6.0, ("linear_qkv",), True))
    refused(r"unexpected .*q_proj\.lora_A", LoRAConfig(3, 7.0, ("v_proj", "k_proj"), True))
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    refused(r"StateMismatchError: .* missing .*lora_magnitude_vector", replace(read_config, dora=True))
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    refused("UnsupportedModelError: .*init_lora_weights='pissa' changed the base weights.*path_initial_model")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"rank_pattern": {r"layers.1.*q_proj": 8}}))
    refused(
        r"UnsupportedModelError: model\.layers\.1\.self_attn\.q_proj has rank 8 and alpha 7, \S+\.\w_proj has rank 3 "
        r"and alpha 7, and Megatron computes them as one linear"
    )
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"alpha_pattern": {r"layers.1.*_proj": 8}}))
    refused(r"has rank 3 and scale 2.66667, the model's adapters 3 and 2.33333: .*model\.layers\.1\.self_attn\.q_proj")
    (adapter / ADAPTER_CONFIG).write_text("{}")
    refused("CheckpointError: .*adapter_config.json: r: is missing; .*lora_alpha: is missing; a number above 0")


def test_configs_of_foreign_adapters_are_refused(scratch: Path, tmp_path: Path) -> None:
    spec, adapter = AutoBridge.from_pretrained(_base(scratch, "qwen2")).spec, tmp_path
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        read_lora_config(spec, adapter)
    save_file({f"{PEFT_PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)}, adapter / ADAPTER_FILE)
    with pytest.raises(StateMismatchError, match=r"does not have: model\.layers\.9\.self_attn\.q_proj"):
        read_lora_config(spec, adapter)
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LOHA"}))
    with pytest.raises(UnsupportedModelError, match="peft_type='LOHA' is not supported"):
        read_lora_config(spec, adapter)
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    save_file({f"{PEFT_PREFIX}lm_head.base_layer.weight": torch.zeros(515, 64)}, adapter / ADAPTER_FILE)
    with pytest.raises(UnsupportedModelError, match=r"weights of the base model .*lm_head\.base.*save_embedding_layers=False"):
        read_lora_config(spec, adapter)
    save_file({f"{PEFT_PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(2, 515)}, adapter / ADAPTER_FILE)
    with pytest.raises(UnsupportedModelError, match=r"adapters of embeddings, which are not supported: model\.embed_tokens"):
        read_lora_config(spec, adapter)
