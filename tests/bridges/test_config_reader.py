"""What families see of a config, and that code which a checkpoint brings is never run."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_checkpoint, tiny_config
from typer.testing import CliRunner

from mbridge_rl import bridges
from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import model_spec
from mbridge_rl.bridges.blocks import config_reader
from mbridge_rl.bridges.blocks.config_reader import ConfigReader
from mbridge_rl.bridges.blocks.decoder import attention, decoder, gated_mlp
from mbridge_rl.cli import app
from mbridge_rl.core.errors import BridgeError, CheckpointError, UnsupportedModelError
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.hf.config import load_config
from mbridge_rl.integrations import mbridge, megatron_bridge


def reader(variant: str = "llama", **changes: Any) -> ConfigReader:
    return ConfigReader(tiny_config(variant, **changes))


def test_a_reader_answers_what_the_class_declares() -> None:
    hf = reader(sliding_window=5)
    assert hf.hidden_size == 64
    assert hf.get("sliding_window") is None  # Llama's class has none
    assert not hf.declares("sliding_window")
    assert hf.undeclared("sliding_window") == 5
    with pytest.raises(AttributeError, match="LlamaConfig declares no field sliding_window"):
        _ = hf.sliding_window
    windowed = reader("qwen2", use_sliding_window=True, sliding_window=5)
    assert windowed.sliding_window == windowed.get("sliding_window") == 5


def test_a_field_has_all_of_its_names() -> None:
    hf = reader("mixtral")
    assert hf.num_local_experts == hf.num_experts == 6
    assert "num_local_experts" not in {name for name, *_ in reader("mixtral").unread()} - {"num_local_experts"}
    hf = reader("mixtral", num_local_experts=5)
    _ = hf.num_experts
    assert "num_local_experts" not in {name for name, *_ in hf.unread()}


def test_values_are_checked_where_they_are_read() -> None:
    config = tiny_config("llama")
    object.__setattr__(config, "hidden_size", -64)  # past Transformers' own checks of types, which ask for no size
    with pytest.raises(
        CheckpointError, match=r"LlamaForCausalLM: hidden_size=-64 in the config; expected an integer from 1 to"
    ):
        model_spec(config)


def test_required_values() -> None:
    hf = reader(scoring_func="sigmoid", attention_bias=True)
    hf.require("scoring_func", "softmax", "sigmoid")
    hf.require("topk_method", "greedy")  # says nothing
    with pytest.raises(
        UnsupportedModelError, match="attention_bias=True is not supported by its bridge, which needs attention_b"
    ):
        hf.require("attention_bias", False)
    with pytest.raises(UnsupportedModelError, match="scoring_func='sigmoid' is not supported"):
        hf.require("scoring_func", "softmax")


def test_other_values_are_answered_in_place_of_the_configs() -> None:
    hf = reader(mlp_bias=True)
    assert hf.with_values(mlp_bias=False).mlp_bias is False
    assert hf.mlp_bias is True
    assert "mlp_bias" not in {name for name, *_ in hf.unread()}


def forgetful(hf: ConfigReader) -> ModelSpec:
    """A Llama whose MLPs' biases nobody thought of."""
    return decoder(hf, attention(hf), gated_mlp(hf, bias=False))


def test_a_field_that_a_family_overlooks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bridges.FAMILIES, "LlamaForCausalLM", forgetful)
    assert model_spec(tiny_config("llama")).num_layers == 4
    with pytest.raises(
        UnsupportedModelError, match="mlp_bias=True is not supported: its bridge knows the model with mlp_bias=Fa"
    ):
        model_spec(tiny_config("llama", mlp_bias=True))


def test_unknown_fields_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    config_reader._warn_of_unknown.cache_clear()
    with caplog.at_level(logging.WARNING, logger=config_reader.__name__):
        for _ in range(2):
            model_spec(tiny_config("llama", sliding_window=5, use_cache=False, torch_dtype="float32", seq_aux=True))
    [record] = [record for record in caplog.records if record.name == config_reader.__name__]
    assert record.getMessage().endswith("LlamaConfig does not know: seq_aux, sliding_window")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_layer_config": {1: {"intermediate_size": 48}}}, "per_layer_config"),
        ({"is_causal": False}, "is_causal=False"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True"),
    ],
)
def test_what_no_family_expresses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model_spec(tiny_config("llama", **changes))


def test_rotary_parameters_by_hand_need_their_base() -> None:
    """Transformers keeps `rope_theta` of config.json out of a dictionary that replaces the config's own."""
    config = tiny_config("qwen3")
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(CheckpointError, match="rope_parameters has no rope_theta"):
        model_spec(config)


# Code that a checkpoint brings.


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose code, once run, leaves a file; whoever asks at the terminal whether to run it hears yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('')\n"
    (tmp_path / "configuration_trap.py").write_text(f"{code}from transformers import PreTrainedConfig as TrapConfig\n")
    (tmp_path / "tokenization_trap.py").write_text(f"{code}from transformers import PreTrainedTokenizerFast as TrapTokenizer\n")
    config = {"architectures": ["TrapForCausalLM"], "model_type": "trap"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "configuration_trap.TrapConfig"}}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_trap.TrapTokenizer", None]}, "tokenizer_class": "TrapTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path


@pytest.mark.parametrize(
    "read",
    [
        load_config,
        AutoBridge.from_pretrained,
        lambda path: megatron_bridge.AutoBridge.from_hf_pretrained(path, trust_remote_code=True),
        lambda path: mbridge.AutoBridge.from_pretrained(str(path), trust_remote_code=True),
    ],
    ids=["load_config", "AutoBridge", "megatron_bridge", "mbridge"],
)
def test_code_of_a_checkpoint_is_never_run(trap: Path, read: Any) -> None:
    with pytest.raises(BridgeError, match=r"model_type='trap'; code that a checkpoint brings \(auto_map\) is never run"):
        read(trap)
    assert not (trap / "ran").exists()


@pytest.mark.parametrize("command", [["inspect"], ["plan"], ["verify"]])
def test_no_command_runs_it(trap: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, str(trap)], input="y\n")
    assert result.exit_code != 0
    assert not (trap / "ran").exists()


def test_training_does_not_run_a_tokenizers_code(trap: Path) -> None:
    from mbridge_rl.training.run.setup import load_tokenizer

    config = SimpleNamespace(model=SimpleNamespace(tokenizer=str(trap)))
    with pytest.raises(Exception, match=r"trust_remote_code|Trap"):
        load_tokenizer(config)
    assert not (trap / "ran").exists()


def test_a_config_that_transformers_knows_needs_no_code(trap: Path) -> None:
    """Its `auto_map` stays, by which others find the code that is saved beside."""
    tiny_checkpoint(trap, "llama")
    path, auto_map = trap / "config.json", {"AutoConfig": "configuration_trap.TrapConfig"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    config = load_config(trap)
    assert type(config).__name__ == "LlamaConfig"
    assert config.auto_map == auto_map
    assert AutoBridge.from_pretrained(trap).spec.architecture == "LlamaForCausalLM"
    assert not (trap / "ran").exists()


def test_engines_run_it_only_where_they_are_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mbridge_rl.sync.vllm.engines import in_process as engine

    def refusing(**arguments: Any) -> None:
        raise InterruptedError(str(arguments["trust_remote_code"]))

    monkeypatch.setattr(engine, "import_vllm", lambda: (refusing, lambda backend: backend))
    monkeypatch.setattr(engine, "register", lambda: None)
    monkeypatch.setattr(engine, "_drop_groups_without_experts", lambda: None)
    for options, answer in (({}, "False"), ({"trust_remote_code": True}, "True")):
        with pytest.raises(InterruptedError, match=answer):
            engine.InProcessEngine(tmp_path, **options)


def test_older_spellings_are_read_as_the_newest_ones() -> None:
    """Transformers before 5.13 calls Nemotron-H's layers `mamba` and `attention`."""
    older = dataclasses.make_dataclass(
        "NemotronHConfig",
        [("layers_block_type", list, dataclasses.field(default_factory=list))],
        namespace={"attribute_map": {}},
    )
    hf = ConfigReader(older(["mamba", "moe", "attention", "mlp"]), architecture="NemotronHForCausalLM")
    assert hf.layers_block_type == ["linear_attention", "moe", "full_attention", "mlp"]


def test_a_constant_of_an_older_class_is_read_like_a_field() -> None:
    """Transformers before 5.19 has both numbers of GPT-OSS's activation in its model, and ignores others in a config."""
    older = dataclasses.make_dataclass("GptOssConfig", [("hidden_size", int, 8)], namespace={"attribute_map": {}})
    config = older()
    assert ConfigReader(config, architecture="GptOss").swiglu_alpha == 1.702
    assert ConfigReader(config, architecture="GptOss").swiglu_limit == 7.0
    config.swiglu_limit = 7.0
    assert ConfigReader(config, architecture="GptOss").swiglu_limit == 7.0
    config.swiglu_limit = 6.0
    with pytest.raises(UnsupportedModelError, match=r"swiglu_limit=6\.0 is not supported .* needs swiglu_limit=7\.0"):
        _ = ConfigReader(config, architecture="GptOss").swiglu_limit
