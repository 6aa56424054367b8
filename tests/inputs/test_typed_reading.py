"""What others wrote is read by one reader: every wrong field is named, with what was expected, and nothing was done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from mbridge_rl.bounded_http import Answer
from mbridge_rl.bridges import model_spec
from mbridge_rl.core.errors import BridgeError, CheckpointError, SyncError
from mbridge_rl.core.json_text import JSONTextError, parse_json
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.patterns import PatternError, _parser, _Walk, pattern_matches
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.peft import ADAPTER_CONFIG, read_lora_config
from mbridge_rl.sync.record.report import SyncReport
from mbridge_rl.sync.record.sinks import SYNCS_FILE, read_syncs
from mbridge_rl.sync.vllm.engines.server import ServerEngine
from mbridge_rl.sync.vllm.engines.server_answers import Choices, Models, WorldSize
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.run.config import RunConfig, TaskConfig, load_run_config
from mbridge_rl.training.run.config_file import ConfigError, parse_config
from mbridge_rl.training.run.recipe_run import prepare_run
from mbridge_rl.training.run.report import write_report
from mbridge_rl.training.run.run_log import METRICS_FILE, RunLog
from mbridge_rl.training.run.setup import load_tokenizer
from mbridge_rl.training.run.tasks import make_task
from mbridge_rl.training.run.yaml_text import YAMLTextError, parse_yaml

LEAST: dict[str, Any] = {"model": {"path": "toy:qwen3"}, "run_dir": "run"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 32 levels deep"),
        ("[" * 33 + "]" * 33, "nested more than 32 levels deep"),
        ('{"a": 1, "a": 2}', "'a' stands twice in one object"),
        ("1" * 5000, "no JSON: Exceeds the limit"),
        (b"\xff", "no UTF-8 at byte 0"),
        (" " * 101, "more than 100 bytes"),
        ("", "no JSON"),
    ],
)
def test_json_beyond_its_bounds(text: bytes | str, message: str) -> None:
    with pytest.raises(JSONTextError, match=message):
        parse_json(text, most_bytes=100 if text == " " * 101 else 1 << 20)


def test_json_within_its_bounds() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": ' + b"[" * 31 + b"]" * 31 + b"}")["a"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 20,000 values after aliases are followed"),
        ("a: &a [*a]", "an alias leads to itself"),
        ("a: &a {<<: *a}", "an alias leads to itself"),
        ("[" * 5000, "nested more than 32 levels deep"),
        ("a: 1\na: 2", "'a' stands twice in one section"),
        ("a: 2001-99-99", "month must be in"),
        ("a: !!bool x", "no YAML"),
        ("a: !!timestamp x", "no YAML"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("x" * 200_000, "too long: at most 131,072 bytes"),
    ],
)
def test_yaml_beyond_its_bounds(text: str, message: str) -> None:
    with pytest.raises(YAMLTextError, match=message):
        parse_yaml(text)


def test_aliases_may_shorten_a_recipe() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"temperature": float("nan")}}, r"rollout\.temperature: a number is needed, found nan"),
        ({"rollout": {"temperature": "nan"}}, r"rollout\.temperature: a number is needed, found 'nan'"),
        ({"rollout": {"temperature": float("inf")}}, "found inf"),
        ({"trainer": {"learning_rate": float("nan")}}, r"trainer\.learning_rate: a number is needed, found nan"),
        ({"trainer": {"betas": [0.9, 1.0]}}, r"trainer\.betas\[1\] must be at least 0\.0 and below 1\.0, found 1\.0"),
        ({"runner": {"threads": -1}}, r"runner\.threads must be at least 1 and at most 4096, found -1"),
        ({"engine": {"threads": 0}}, r"engine\.threads must be at least 1 and at most 4096, found 0"),
        ({"engine": {"call_timeout": 1e300}}, r"engine\.call_timeout must be above 0\.0 and at most"),
        ({"engine": {"options": {"x": float("nan")}}}, r"engine\.options\.x: text, a finite number, .*found nan"),
        ({"seed": 2**31}, r"seed must be at least 0, found 2147483648"),
        ({"seed": -1}, r"seed must be at least 0, found -1"),
        ({"seed": 2**70}, "seed: a whole number is needed, found 1180591620717411303424"),
        ({"rollout": {"stop": ["x", ""]}}, "rollout.stop must not hold an empty text"),
        ({"rollout": {"stop_token_ids": [-1]}}, r"rollout\.stop_token_ids\[0\] must be at least 0, found -1"),
        ({"run_dir": ""}, "run_dir: a path is needed, found ''"),
        ({"run_dir": "a\0b"}, r"run_dir: a path is needed, found 'a\\x00b'"),
        ({"model": {"path": "\ud800"}}, r"model\.path: text is needed, found '\\ud800'"),
        ({"model": {"path": "toy:qwen3", "toy": {"characters": "aa"}}}, r"model\.toy: characters must be text in which each"),
        ({"model": {"path": "toy:qwen3", "overrides": {3: 4}}}, r"model\.overrides: names must be text, found 3"),
        ({"logging": {"prometheus_port": 70000}}, r"logging\.prometheus_port must be at least 0 and at most 65535"),
        ({"sync": {"quantization": {"block": [0, 1]}}}, r"sync\.quantization\.block\[0\] must be at least 1, found 0"),
        ({"layout": {"dp": 10**9}}, "layout: at most 16,777,216 ranks can be planned"),
        ({"lora": {"rank": 0}}, "rank"),
    ],
)
def test_values_that_no_run_can_have(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(RunConfig, LEAST | sections)


def test_a_config_that_was_made_in_code_has_the_same_bounds() -> None:
    good = parse_config(RunConfig, LEAST)
    with pytest.raises(ConfigError, match=r"seed must be at least 0, found -1"):
        RunConfig(good.model, good.run_dir, seed=-1)
    with pytest.raises(ValueError, match=r"learning_rate must be a finite number, found nan"):
        type(good.trainer)(learning_rate=float("nan"))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\x00\xfe")
    for path in (tmp_path / "recipe.yaml", tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError):
            load_run_config(path)


@pytest.mark.parametrize("run_dir", ["file", "file/below", "x" * 300])
def test_a_run_folder_that_cannot_be_one(run_dir: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    config = parse_config(RunConfig, LEAST | {"run_dir": str(tmp_path / run_dir)})
    with pytest.raises(ConfigError, match=r"run_dir: .* must be a directory, or a place for one"):
        prepare_run(config, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_cannot_be_prepared_leaves_no_folder(tmp_path: Path) -> None:
    config = parse_config(RunConfig, LEAST | {"run_dir": str(tmp_path / "run"), "task": {"chat": True}})
    with pytest.raises(ConfigError, match=r"task\.chat: the tokenizer has no chat template; name one that has"):
        prepare_run(config, resume=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("template", ["{{ raise_exception('no [/INST]') }}", "{% if %}", "{{ messages[9].content }}"])
def test_a_chat_template_that_fails(template: str) -> None:
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"task\.chat: the tokenizer's chat template fails: "):
        make_task(TaskConfig(chat=True), tokenizer)


@pytest.mark.parametrize("text", ["", "[]", '{"version": "x"}', "\xff"])
def test_a_tokenizer_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, "latin-1")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    config = parse_config(RunConfig, LEAST | {"model": {"path": "toy:qwen3", "tokenizer": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"model\.tokenizer: .* has no tokenizer that can be read"):
        load_tokenizer(config)


def written(path: Path, header: Any, data: int, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data))
    return path.parent


def entry(shape: Any = (2, 2), start: Any = 0, stop: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "the header must be an object, found a list"),
        ({"a": 3}, "'a' must be an object with dtype, shape and data_offsets, found 3"),
        ({"a": entry(dtype="F4")}, "a is 'F4', which is none of BOOL, "),
        ({"a": entry(dtype=["F32"])}, r"a is \['F32'\], which is none of"),
        ({"a": entry(shape=[2, -2])}, r"a: shape must be a list of at most 64 whole numbers, found \[2, -2\]"),
        ({"a": entry(shape=[2, True])}, r"found \[2, True\]"),
        ({"a": entry(shape=[1] * 65)}, "at most 64 whole numbers"),
        ({"a": entry(shape=[2, 3])}, r"a has 16 bytes, its shape \[2, 3\] says otherwise"),
        ({"a": entry(shape=[2**32, 2**32])}, r"no tensor can have the shape \[4294967296, 4294967296\]"),
        ({"a": entry(shape=[0, 2**40, 2**40], stop=0)}, "no tensor can have the shape"),
        ({"a": entry(start=16, stop=0)}, r"data_offsets must be the first byte and the one behind the last, found \[16, 0\]"),
        ({"a": entry(start=4, stop=20)}, "a begins at byte"),
        ({"a": entry(), "b": entry()}, "b begins at byte"),
        ({"a": entry(), "b": entry(start=8, stop=24)}, "b begins at byte"),
        ({"a": entry(shape=[8], stop=32)}, "its tensors end at byte"),
        ({"__metadata__": {"format": 3}, "a": entry()}, "__metadata__ must map names to text"),
        (b'{"a": 1, "a": 2}', "'a' stands twice in one object"),
        (b"[" * 100_000, "nested more than 32 levels deep"),
    ],
)
def test_headers_that_no_file_can_have(header: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(written(tmp_path / "model.safetensors", header, 16))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_lengths_of_headers_that_no_file_can_have(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"a header of {length} bytes in a file of"):
        Checkpoint(written(tmp_path / "model.safetensors", {"a": entry()}, 16, length))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r must be at least 1 and at most 65536, found 0"),
        ({"r": "8"}, "r: a whole number is needed, found '8'"),
        ({"r": True}, "r: a whole number .* found True"),
        ({"lora_alpha": -4}, r"lora_alpha must be above 0\.0, found -4"),
        ({"lora_alpha": float("nan")}, r"lora_alpha: a number is needed, found nan"),
        ({"lora_alpha": None}, "lora_alpha: .* found nothing"),
        ({"lora_dropout": 1.5}, r"lora_dropout must be at least 0\.0 and below 1\.0, found 1\.5"),
        ({"use_rslora": "yes"}, "use_rslora: true or false is needed, found 'yes'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: a section is needed, found a list"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj must be at least 1"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\.q_proj: a number is needed, found 'x'"),
        ({"target_parameters": "all"}, r"target_parameters: a list \(text each\) is needed, found 'all'"),
    ],
)
def test_adapter_configs_that_no_adapter_has(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lora_config(model_spec(tiny_config("qwen2")), tmp_path)
    assert str(tmp_path / ADAPTER_CONFIG) in str(caught.value)


NAME = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*!", "(?:.|..|...)*!", "(x+x+)+y", "(?:" * 60 + "a" + "{1,100})" * 60, "(.|.)" * 40]
)
def test_patterns_that_would_never_end(pattern: str) -> None:
    assert pattern_matches(pattern, NAME) is False


@pytest.mark.parametrize("pattern", ["o_(", "(" * 5000, "a{99999999999}", "(?i)x", "a)|(b", "(?i:x)(a|b)*", "x" * 20_000])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(PatternError):
        pattern_matches(pattern, NAME)
    with pytest.raises(ValueError, match="LoRA's pattern"):
        LoRAConfig(rank_pattern={pattern: 2}).require_valid()


def test_a_pattern_that_takes_long_for_every_name_is_given_up() -> None:
    names = [f"{NAME}.{number}" for number in range(100)]
    with pytest.raises(PatternError, match="takes too long to match"):
        [pattern_matches("(.*.*.*)*" * 100, name) for name in names]


ATOMS = (
    *(
        "a",
        "b",
        ".",
        "[ab]",
        "[^a]",
        r"\w",
        r"\d",
        r"\.",
        "(a|b)",
        "(?:a|)",
        "^",
        "$",
        r"\b",
        "(?=a)",
        "(?!b)",
        "a{2}",
        "b{0,2}",
    ),
    *("x*?", "(ab)*", "(a*)*", "(a|b.)+", "[a-c]{1,3}", r"\s", r"[\d.]", "(?:a?b?)*"),
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(ATOMS), st.sampled_from(("", "", "*", "+", "?", "{1,2}", "*?"))), min_size=1, max_size=4
    ),
    st.text("abc.1", min_size=1, max_size=8),
)
def test_sets_of_positions_match_what_python_matches(parts: list[tuple[str, str]], name: str) -> None:
    in_peft = rf"(.*\.)?({''.join(atom + times for atom, times in parts)})$"
    try:
        expected = re.match(in_peft, name) is not None
    except re.error:
        return
    try:
        walk = _Walk(in_peft, _parser.parse(in_peft))
    except PatternError:  # repeats that Python 3.11 calls possessive are not supported
        return
    assert walk(name) is expected


def test_lines_of_a_run_that_are_none(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2: no JSON"):
        write_report(tmp_path)
    (tmp_path / METRICS_FILE).write_text('{"step": "x"}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: every line needs step, a whole number, found 'x'"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="every line needs step"):
        RunLog(tmp_path, console=False, tensorboard=False, resumed_at=3)
    assert (tmp_path / METRICS_FILE).read_text() == '{"step": "x"}\n'


def test_a_report_of_what_no_file_can_hold(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps({"step": 1, "x": "\ud800", "reward": 10**400}) + "\n")
    (tmp_path / "config.yaml").write_bytes(b"steps: [\xff")
    assert "\\ud800" in write_report(tmp_path).read_text("utf-8")
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"summary\.json must hold an object"):
        write_report(tmp_path)


RECORD = SyncReport(3, 1, 4, 1, "d", True, 0.5).to_json()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "x"}, "version: a whole number is needed, found 'x'"),
        ({"seconds": 0}, r"seconds=0\.0 must be above 0"),
        ({"spans": [{"lane": "x"}]}, r"spans\[0\]\.phase: is missing"),
        ({"spans": [{"lane": "x", "phase": "", "inside": "", "start": 0, "end": 1, "busy": 1}]}, "a lane is named as in"),
        ({"outcomes": {}}, "outcomes: a list"),
    ],
)
def test_records_of_syncs_that_are_none(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / SYNCS_FILE).write_text(json.dumps(RECORD | changes) + "\n")
    with pytest.raises(BridgeError, match=message):
        read_syncs(tmp_path)


def test_a_record_of_a_sync_comes_back() -> None:
    assert SyncReport.from_json(json.loads(json.dumps(RECORD))).to_json() == RECORD


@pytest.mark.parametrize(
    ("cls", "body", "message"),
    [
        (WorldSize, b'{"world_size": 0}', "world_size must be at least 1, found 0"),
        (WorldSize, b"[1]", "a section with fields is needed, found a list"),
        (WorldSize, b"[" * 100_000, "nested more than 32 levels deep"),
        (WorldSize, b"<html>", "cannot be read: no JSON"),
        (Models, b'{"data": [{"root": "x"}]}', r"data\[0\]\.id: is missing"),
        (Choices, b'{"choices": [{"index": 0, "token_ids": ["1"]}]}', r"choices\[0\]\.token_ids\[0\]: a whole number"),
        (
            Choices,
            b'{"choices": [{"index": 0, "token_ids": [1], "weight_versions": [{"version": "3", "start": 0, "end": 9}]}]}',
            r"choices\[0\]: weight_versions end beyond the 1 tokens",
        ),
    ],
)
def test_answers_of_a_server_that_vllm_does_not_give(cls: type[Any], body: bytes, message: str) -> None:
    engine = object.__new__(ServerEngine)  # without a connection
    engine._url = "http://nowhere"
    with pytest.raises(SyncError, match=message) as caught:
        engine._read("/path", Answer(200, "application/json", body), cls)
    assert "the server http://nowhere answered /path" in str(caught.value)


def test_recipes_stay_as_they_were() -> None:
    for path in sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml")):
        assert parse_yaml(path.read_bytes()) == yaml.safe_load(path.read_text())
