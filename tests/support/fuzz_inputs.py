"""Inputs that strangers write, by kind: how Hypothesis makes them, and what reading one of them may do."""

from __future__ import annotations

import functools
import json
import math
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hostile import damaged, damaged_text, only_our_errors, seldom
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from tiny import tiny_config

from mbridge_rl.bounded_http import Answer
from mbridge_rl.bridges import model_spec
from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.core.json_text import MOST_DEPTH
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.peft import ADAPTER_CONFIG, ADAPTER_FILE, open_adapter, read_lora_config
from mbridge_rl.hf.source import open_source
from mbridge_rl.hf.state import check_hf_state
from mbridge_rl.training.rollout import rewards
from mbridge_rl.training.rollout.rewards import HTTPJudge, Problem
from mbridge_rl.training.run.config import RunConfig, load_run_config
from mbridge_rl.training.run.config_file import as_mapping, parse_config

SIZES = {"num_hidden_layers": 1, "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2}
RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@functools.cache
def config() -> Any:
    return tiny_config("llama", **SIZES, num_key_value_heads=1)


@functools.cache
def spec() -> ModelSpec:
    return model_spec(config())


@functools.cache
def state() -> dict[str, torch.Tensor]:
    return {hf_name: torch.zeros(shape) for hf_name, shape in spec().hf_shapes.items()}


def read_all(directory: Path) -> None:
    """As a load does: everything is checked against the model first, then every tensor is read."""
    for tensor in open_source(spec(), config(), directory).values():
        assert torch.isfinite(tensor).all()


# Indexes: two files of a checkpoint, and a file beside that is none of its.


def halves() -> list[dict[str, torch.Tensor]]:
    names = sorted(state())
    return [{name: state()[name] for name in half} for half in (names[::2], names[1::2])]


def index() -> dict[str, Any]:
    return {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, part in zip(FILES, halves(), strict=True) for name in part},
    }


INDEXES = st.deferred(lambda: damaged_text(damaged(index(), FILES)))


def try_index(directory: Path, text: bytes) -> None:
    (directory / "model.safetensors.index.json").write_bytes(text)
    with only_our_errors(directory.parent):
        read_all(directory)


# Headers of safetensors files.


def header() -> dict[str, Any]:
    content = save(state(), {"format": "pt"})
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def data() -> bytes:
    content = save(state(), {"format": "pt"})
    return content[8 + int.from_bytes(content[:8], "little") :]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """The bytes of a file: length, header, data, of which each may be wrong."""
    text = draw(damaged_text(damaged(header(), ("dtype", "shape", "data_offsets"))))
    right = len(text)
    length = draw(seldom(right, (0, 1, right - 1, right + 8, 2**31, 2**63, 2**64 - 1)))
    content = length.to_bytes(8, "little", signed=False) + text + data()
    end = len(content)
    return content[: draw(seldom(end, (end - 1, 0, 7, 8, 9)))]


def try_header(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with only_our_errors(directory):
        checkpoint = Checkpoint(directory)
        # An accepted file is read as the format's own library reads it.
        expected = load_file(directory / "model.safetensors")
        assert checkpoint.keys() == expected.keys()
        assert all(torch.equal(bits(tensor), bits(expected[name])) for name, tensor in checkpoint.items())
        read_all(directory)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# Adapters of PEFT.


@functools.cache
def adapter() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    lora = LoRAConfig(2, 4.0, ("q_proj", "v_proj", "down_proj"), canonical=True)
    tensors = {name: torch.zeros(shape) for name, shape in adapter_spec(spec(), lora).hf_shapes.items()}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {"layers.0.*q_proj": 2},
        "alpha_pattern": {"(q|v)_proj": 4},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "target_parameters": None,
        "layers_to_transform": None,
        "modules_to_save": None,
    }
    return values, tensors


@st.composite
def adapters(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """`adapter_config.json`, and now and then other names in the file of tensors."""
    values, tensors = adapter()
    fields = ("target_parameters", "trainable_token_indices", "exclude_modules", "layers_pattern", "megatron_config")
    text = draw(damaged_text(damaged(values, fields)))
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(sorted(tensors)))
        others = ("", "x", name.replace("layers.0", "layers.9"), name.replace(".weight", ""), "base_model.model.lora_A.weight")
        other = draw(st.sampled_from(others))
        tensors = {other if known == name else known: tensor for known, tensor in tensors.items()}
    return text, save(tensors)


def try_adapter(directory: Path, content: tuple[bytes, bytes]) -> None:
    (directory / ADAPTER_CONFIG).write_bytes(content[0])
    (directory / ADAPTER_FILE).write_bytes(content[1])
    with only_our_errors(directory):
        config = read_lora_config(spec(), directory)
        check_hf_state(adapter_spec(spec(), config), open_adapter(directory).entries, "the adapter")


# Recipes.


@functools.cache
def recipes() -> list[dict[str, Any]]:
    """Every example, and everything that a recipe can say."""
    given_ones = [yaml.safe_load(path.read_text()) for path in RECIPES]
    least = {"model": {"path": "toy:qwen3"}, "run_dir": "run"}
    everything = parse_config(RunConfig, least | {"lora": {}, "sync": {"quantization": {}}})
    return [*given_ones, as_mapping(everything)]


def as_yaml(value: Any) -> str:
    return yaml.dump(value, allow_unicode=False, sort_keys=False)


RECIPE_FIELDS = ("stop", "threads", "seed", "<<", "environment")
RECIPE_TEXTS = st.deferred(
    lambda: damaged_text(st.sampled_from(recipes()).flatmap(lambda recipe: damaged(recipe, RECIPE_FIELDS)), as_yaml)
)


def try_recipe(directory: Path, text: bytes) -> None:
    path = directory / "recipe.yaml"
    path.write_bytes(text)
    with only_our_errors(directory):
        run = load_run_config(path, ["steps=3"])
        assert all(math.isfinite(number) for number in numbers(as_mapping(run)))
        assert run.rollout.temperature > 0
        assert min(run.runner.threads, run.engine.threads, run.rollout.max_tokens, run.algorithm.group_size) >= 1
        assert 0 <= run.seed < 2**31
        assert parse_config(RunConfig, yaml.safe_load(yaml.safe_dump(as_mapping(run)))) == run


def numbers(value: Any) -> list[float]:
    """All that are inside of a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [number for item in inner for number in numbers(item)] + ([value] if isinstance(value, int | float) else [])


# Answers of a reward service: bodies, and the bytes of HTTP.


STATUSES = (
    *(
        b"HTTP/1.0 200 OK",
        b"HTTP/1.0 200 OK",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 100 Continue",
        b"HTTP/1.1 302 F",
        b"HTTP/1.1 500 E",
    ),
    *(b"HTTP/9.9 -1", b"", b"\x16\x03\x01", b"x" * 70_000),
)
ANSWERS = damaged_text(damaged({"rewards": [1.0, 0.0, 0.5], "model": "judge"}, ("rewards",)))
QUESTIONS = [(Problem("1+1", "2"), completion) for completion in ("2", "[/INST]", "3")]


def check_verdicts(verdicts: list[rewards.Verdict]) -> None:
    assert len(verdicts) == len(QUESTIONS)
    for verdict in verdicts:
        assert math.isfinite(verdict.reward)
        assert verdict.error is None or (verdict.reward == 0.0 and 0 < len(verdict.error) < 1000)


def try_answer(_: Path, body: bytes) -> None:
    with pytest.MonkeyPatch.context() as patched, only_our_errors():
        patched.setattr(rewards, "request", lambda *_, **__: Answer(200, "application/json", body))
        verdicts = HTTPJudge("http://nowhere/").judge(QUESTIONS)
    check_verdicts(verdicts)
    for verdict, reward in zip(verdicts, rewards_of(body), strict=True):
        assert (verdict.error is None) is (type(reward) in (int, float) and -1e308 <= reward <= 1e308)


def rewards_of(body: bytes) -> list[Any]:
    """The rewards of an answer as `json` reads them; `None` for each if there are none or the answer is nested too deeply."""
    try:
        rewards_of_answer = json.loads(body)["rewards"]
        if (
            depth(json.loads(body)) <= MOST_DEPTH
            and len(rewards_of_answer) == len(QUESTIONS)
            and isinstance(rewards_of_answer, list)
            and body.count(b'"rewards"') == 1
        ):
            return rewards_of_answer
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return [None] * len(QUESTIONS)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@st.composite
def exchanges(draw: st.DrawFn) -> bytes:
    """All that a server sends on one connection."""
    body = draw(ANSWERS)
    status = draw(st.sampled_from(STATUSES))
    fields = draw(
        st.lists(
            st.sampled_from(
                (
                    b"Content-Type: application/json",
                    b"Content-Length: %d" % len(body),
                    b"Content-Length: -5",
                    b"Content-Length: 99999999999999999999",
                    b"Transfer-Encoding: chunked",
                    b"Content-Encoding: gzip",
                    b"Location: file:///etc/passwd",
                    b"Content-Type: \xff; charset=\xff",
                    b": ",
                    b"a",
                    b"x: " + b"y" * 70_000,
                    b"\r\n".join(b"h%d: 1" % number for number in range(150)),
                )
            ),
            max_size=3,
        )
    )
    return b"\r\n".join([status, *fields]) + b"\r\n\r\n" + body


class Service(socketserver.ThreadingTCPServer):
    """Sends `response` to every request, and closes the connection."""

    daemon_threads = True
    response = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, *_: object) -> None:
        """The client may hang up."""


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        self.wfile.write(self.server.response)  # type: ignore[attr-defined]


@functools.cache
def service() -> Service:
    server = Service(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def try_exchange(_: Path, sent: bytes) -> None:
    service().response = sent
    with only_our_errors():
        check_verdicts(HTTPJudge(service().url, timeout=60.0).judge(QUESTIONS))


# Configs.


@functools.cache
def config_values() -> list[dict[str, Any]]:
    variants = ("llama", "qwen3-moe", "mixtral")
    return [json.loads(json.dumps(tiny_config(variant).to_dict(), default=str)) for variant in variants]


CONFIG_FIELDS = ("sliding_window", "rope_scaling", "layer_types")
CONFIGS = st.deferred(lambda: st.sampled_from(config_values()).flatmap(lambda values: damaged(values, CONFIG_FIELDS)))


def try_config(_: Path, values: Any) -> None:
    config_spec = pytest.importorskip("mbridge_rl.config_spec")
    with only_our_errors():
        config_spec.spec_of_config(values)


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Path, Any], None]]] = {
    "indexes": (INDEXES, try_index),
    "headers": (headers(), try_header),
    "adapters": (adapters(), try_adapter),
    "recipes": (RECIPE_TEXTS, try_recipe),
    "answers": (ANSWERS, try_answer),
    "exchanges": (exchanges(), try_exchange),
    "configs": (CONFIGS, try_config),
}
