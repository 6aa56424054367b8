"""Whatever strangers write is read, or refused by an error of this library that names it: never a raw error, never a long run,
nothing half written. 200 inputs of each kind; `make nightly` tries `MBRIDGE_FUZZ_INPUTS` (10,000) others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz_inputs import FILES, KINDS, config_values, data, halves, header, index, state
from hostile import NIGHTLY, ORDINARY
from hypothesis import given
from safetensors import SafetensorError
from safetensors.torch import load, save

from mbridge_rl.core.errors import CheckpointError
from mbridge_rl.hf.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("index") / "checkpoint"
    directory.mkdir()
    for file, part in zip(FILES, halves(), strict=True):
        (directory / file).write_bytes(save(part))
    (directory.parent / "x").write_bytes(save(state()))
    return directory


@pytest.fixture
def place(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.getfixturevalue("sharded") if kind == "indexes" else tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_what_strangers_write_is_read_or_refused(kind: str, place: Path) -> None:
    inputs, attempt = KINDS[kind]
    ORDINARY(given(inputs)(lambda content: attempt(place, content)))()


def with_name(file: str) -> bytes:
    return json.dumps(index() | {"weight_map": dict.fromkeys(state(), file)}).encode()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        pytest.param("indexes", with_name("9" * 50_000), id="a file name that no message should repeat"),
        pytest.param("configs", {"attention_dropout": "x" * 50_000}, id="a value that no message should repeat"),
        pytest.param("headers", {"": float("inf")}, id="Infinity where nobody reads it"),
        pytest.param("headers", {"\ud800": None}, id="half of a surrogate pair where nobody reads it"),
        pytest.param("recipes", b"[" * 1100, id="nested without an end"),
        pytest.param("answers", b'{"rewards": [' + b"[" * 40 + b"]" * 40 + b", 0.0, 0.5]}", id="one reward nested too deeply"),
    ],
)
def test_what_was_found_once(kind: str, content: Any, place: Path) -> None:
    if kind == "headers":
        text = json.dumps(header() | content).encode()
        content = len(text).to_bytes(8, "little") + text + data()
        with pytest.raises(SafetensorError):
            load(content)
        (place / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="must be an object with dtype, shape and data_offsets"):
            Checkpoint(place)
        return
    KINDS[kind][1](place, config_values()[0] | content if kind == "configs" else content)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_inputs_of_strangers(kind: str, place: Path) -> None:
    inputs, attempt = KINDS[kind]
    NIGHTLY(given(inputs)(lambda content: attempt(place, content)))()
