"""An engine's config is compared as it was given: what vLLM makes of it while it loads a model is no difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import family_scenarios as scenarios
import pytest
import torch
from interpreter import Interpreter
from safetensors.torch import save_file
from tiny import hf_state, tiny_checkpoint, tiny_config

from mbridge_rl.core.errors import EngineMismatch
from mbridge_rl.hf.config import load_config
from mbridge_rl.sync.payload.compatibility import config_summary, require_same_config
from mbridge_rl.sync.vllm.worker.engine_config import config_as_given

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def engine_of(directory: Path, overrides: Any = None) -> tuple[Any, Any]:
    """What vLLM's `ModelConfig` has of a model, and the config in it that vLLM may change."""
    in_memory = load_config(directory)
    given = {"hf_config_path": None, "model": str(directory), "revision": None, "hf_overrides": overrides or {}}
    return SimpleNamespace(hf_config=in_memory, **given), in_memory


FIELDS = [
    *("architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "tie_word_embeddings", "hidden_act", "rms_norm_eps", "num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "norm_topk_prob", "rope_parameters"),
]


@pytest.mark.parametrize("name", FIELDS)
def test_what_an_engine_makes_of_a_field_is_no_difference(name: str, tmp_path: Path) -> None:
    """Every field of the comparison; the same change in config.json is one."""
    tiny_config("qwen3-moe").save_pretrained(tmp_path / "trainer")
    trainer = config_summary(load_config(tmp_path / "trainer"))
    model_config, in_memory = engine_of(tmp_path / "trainer")
    value = getattr(in_memory, name)
    changed = {**value, "rope_type": "deepseek_yarn"} if name == "rope_parameters" else _other(value)
    setattr(in_memory, name, changed)
    require_same_config(trainer, config_as_given(model_config))
    changed = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0} if name == "rope_parameters" else changed
    other = tiny_config("qwen3-moe")
    setattr(other, name, changed)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(EngineMismatch, match=r"rope_type|factor" if name == "rope_parameters" else name.rstrip("s")):
        require_same_config(trainer, config_as_given(engine_of(tmp_path / "other")[0]))


def _other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case list():
            return ["LlamaForCausalLM"]
        case str():
            return "gelu"
        case float():
            return 2 * value
    return 2 * value


OVERRIDES: dict[str, dict[str, Any] | Callable[[Any], Any]] = {
    "flat": {"rms_norm_eps": 1e-2},
    "nested": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "function": lambda config: config.update({"rms_norm_eps": 1e-2}) or config,
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_what_the_user_of_an_engine_overrides_is_a_difference(kind: str, tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    trainer = config_summary(load_config(tmp_path))
    with pytest.raises(EngineMismatch, match=r"rms_norm_eps|rope_type"):
        require_same_config(trainer, config_as_given(engine_of(tmp_path, OVERRIDES[kind])[0]))


@pytest.mark.parametrize(("trainer", "engine"), [(True, False), (False, True)])
def test_what_each_has_built_decides_about_tying(trainer: bool, engine: bool, tmp_path: Path) -> None:
    config = tiny_config("qwen3-tied")
    require_same_config(config_summary(config, tied=trainer), config, tied=trainer)
    with pytest.raises(EngineMismatch, match=r"tie_word_embeddings: the trainer has .*save_pretrained"):
        require_same_config(config_summary(config, tied=trainer), config, tied=engine)


@pytest.fixture(scope="module")
def engines() -> Iterator[Interpreter]:
    pytest.importorskip("vllm")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["equal", "another"])
def test_a_tied_checkpoint_that_keeps_its_head_refits(head: str, engines: Interpreter, tmp_path: Path) -> None:
    """As Qwen3-0.6B does: vLLM clears `tie_word_embeddings`, and ties again where the two are equal."""
    for seed, tag in enumerate("AB"):
        directory, _ = tiny_checkpoint(tmp_path / tag, "qwen3-tied", seed=seed, num_hidden_layers=2, head_dim=32)
        state = hf_state(directory)
        noise = torch.randn(state[EMBEDDING].shape, generator=torch.Generator().manual_seed(seed))
        state[HEAD] = state[EMBEDDING].clone() if head == "equal" else 0.1 * noise
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    engines.call(scenarios.refit_equals_fresh_engine, tmp_path, {}, timeout=600)
