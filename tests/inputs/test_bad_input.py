"""Bad input: each a clear error that says what and where, before any weight was changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import DENSE, hf_state, tiny_checkpoint, tiny_config

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import CheckpointError, LayoutError, StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.hf.nemotron_nas import NemotronNasConfig
from mbridge_rl.megatron.parallel import initialize_parallel

Damage = Callable[[Path], None]


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(directory: Path) -> None:
        state = hf_state(directory)
        change(state)
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    return damage


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def change_config(**fields: object) -> Damage:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **fields}))

    return damage


def lose_a_shard(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})
    )
    (directory / "model.safetensors").unlink()


QKV = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Damage, type[Exception], str]] = {
    "missing": (rewrite(lambda state: state.pop(QKV)), StateMismatchError, f"missing {QKV}"),
    "extra": (rewrite(lambda state: state.update(extra=torch.zeros(2))), StateMismatchError, "unexpected extra"),
    "shape": (
        rewrite(lambda state: state.update({QKV: torch.zeros(3, 64)})),
        StateMismatchError,
        rf"{QKV} has shape \[3, 64\], the config says \[64, 64\]",
    ),
    "dtype": (
        rewrite(lambda state: state.update({QKV: torch.zeros(64, 64, dtype=torch.int8)})),
        StateMismatchError,
        f"{QKV} is torch.int8",
    ),
    "truncated": (truncate, CheckpointError, "model.safetensors is truncated or corrupt"),
    "lost shard": (lose_a_shard, CheckpointError, "model-00002-of-00002.safetensors is missing"),
    "other config": (
        change_config(intermediate_size=144),
        StateMismatchError,
        r"gate_proj.weight has shape \[136, 64\], the config says \[144, 64\]",
    ),
}


def load_damaged(rank: int, directory: Path) -> tuple[str, str, bool]:
    """Loads good weights, then the damaged checkpoint; returns the error and whether the weights are still the good ones."""
    initialize_parallel(ParallelLayout(tp=2))
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model()
    before = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    try:
        bridge.load_weights(model)
    except Exception as error:
        after = [parameter for chunk in model for parameter in chunk.parameters()]
        return type(error).__name__, str(error), all(map(torch.equal, before, after))
    return "", "no error", False


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_change_nothing(name: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGES[name]
    directory, _ = tiny_checkpoint(tmp_path, "qwen2")
    damage(directory)
    for error_name, text, untouched in run_ranks(load_damaged, 2, directory):
        assert error_name == error.__name__, text
        assert untouched
        assert re.search(message, text), text


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        AutoBridge.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing-that-exists"}')
    with pytest.raises(CheckpointError, match="Transformers cannot read it"):
        AutoBridge.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a directory nor a repository"):
        AutoBridge.from_pretrained("nobody/has-this-model")


def test_unsupported_architecture_names_the_nearest() -> None:
    config = tiny_config("qwen3")
    config.architectures = ["Qwen4ForCausalLM"]
    with pytest.raises(UnsupportedModelError, match=r"no bridge for Qwen4ForCausalLM; supported: .*; the nearest is Qwen"):
        AutoBridge.from_config(config)
    config.architectures = None
    with pytest.raises(UnsupportedModelError, match="names no architecture"):
        AutoBridge.from_config(config)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("Llama", {"hidden_act": "gelu_new"}, "hidden_act: activation 'gelu_new' is not supported; supported: silu"),
        (
            "Qwen3",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "rope_parameters.rope_type: rope type 'dynamic'",
        ),
        ("Ministral", {"layer_types": ["chunked_attention"] * 4}, "layer_types: chunked_attention is not supported"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (
            "Gemma3",
            {"rope_parameters": {"full_attention": YARN}, "sliding_window_pattern": 2},
            "rope_parameters.full_attention: .* in only some layers",
        ),
    ],
)
def test_unsupported_features_are_named(architecture: str, fields: dict, message: str) -> None:
    text = "Text" if architecture == "Gemma3" else ""
    config = getattr(transformers, f"{architecture}{text}Config")(**{**DENSE, **fields})
    config.architectures = [f"{architecture}ForCausalLM"]
    with pytest.raises(UnsupportedModelError, match=f"{architecture}ForCausalLM: {message}"):
        AutoBridge.from_config(config)


def test_layers_of_unsupported_kinds_are_named() -> None:
    layer = {"attention": {"no_op": False, "replace_with_linear": True}, "ffn": {"no_op": True}}
    config = NemotronNasConfig(**{**DENSE, "num_hidden_layers": 1, "intermediate_size": None}, block_configs=[layer])
    config.architectures = ["DeciLMForCausalLM"]
    with pytest.raises(UnsupportedModelError, match=r"block_configs\[0\].attention.replace_with_linear: True is not supported"):
        AutoBridge.from_config(config)


def test_quantized_checkpoints_are_named() -> None:
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="quantization_config has quant_method='gptq'"):
        AutoBridge.from_config(config)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(tp=6), r"4 groups \(KV heads\) do not divide by tp=6"),
        (ParallelLayout(pp=3), "4 layers do not divide"),
        (ParallelLayout(ep=3, dp=3), "8 experts do not divide by ep=3"),
    ],
)
def test_impossible_layouts_are_refused_before_a_model_is_built(layout: ParallelLayout, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        AutoBridge.from_config(tiny_config("qwen3-moe", num_attention_heads=12, hidden_size=96)).spec.validate(layout)


def test_shards_of_another_layout(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    bridge = AutoBridge.from_pretrained(directory)
    shards = bridge.shard(hf_state(directory), ParallelLayout(tp=2))
    with pytest.raises(StateMismatchError, match=r"ranks 0\.\.3, the shards are of ranks \[0, 1\]"):
        bridge.unshard(shards, ParallelLayout(tp=4))
    with pytest.raises(StateMismatchError, match="rank 0: missing"):
        bridge.unshard(shards, ParallelLayout(pp=2))
    shards[1]["output_layer.weight"] = torch.zeros(3, 64)
    with pytest.raises(StateMismatchError, match=r"rank 1: output_layer.weight has shape \[3, 64\]"):
        bridge.unshard(shards, ParallelLayout(tp=2))


def save_over(rank: int, directory: Path) -> list[str]:
    initialize_parallel(ParallelLayout(tp=2))
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model()
    bridge.load_weights(model)
    bridge.save_pretrained(model, directory / "saved", shard_bytes=1 << 18)
    bridge.save_pretrained(model, directory / "saved")
    return sorted(path.name for path in (directory / "saved").iterdir())


def test_saving_over_an_older_checkpoint_leaves_no_mixture(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    (directory / "tokenizer.json").write_text("{}")
    for names in run_ranks(save_over, 2, directory):
        assert [name for name in names if name.startswith("model")] == ["model.safetensors"]
        assert {"config.json", "tokenizer.json"} <= set(names)
