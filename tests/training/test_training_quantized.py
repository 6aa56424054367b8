"""Recipes with fp8 engines: refused before anything starts where it cannot be, and the whole run where it can."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from scripted_engine import WritingEngine, hashed
from standin import StandInEngine
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.quantize import Fp8, quantize, quantized_spec, scale_names
from mbridge_rl.distributed.live_fp8 import quantization_config
from mbridge_rl.sync.record.sinks import read_syncs
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.run.config import RunConfig
from mbridge_rl.training.run.config_file import ConfigError, parse_config
from mbridge_rl.training.run.rank import train_rank
from mbridge_rl.training.run.recipe_run import prepare_run, run_training

SCHEME, OPTION = Fp8((32, 32)), {"block": [32, 32]}
WEIGHTS = "model.safetensors"


def in_fp8(state: dict[str, Tensor], bridge: AutoBridge) -> dict[str, Tensor]:
    """The checkpoint in fp8 as one process quantizes it, which has every tensor in full."""
    quantized = dict(state)
    for name, scale in scale_names(quantized_spec(bridge.spec, SCHEME), SCHEME).items():
        quantized[name], quantized[scale] = quantize(state[name], SCHEME)
    return quantized


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`, and the same in fp8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    bridge = AutoBridge.from_pretrained(toy.make_checkpoint(folder / "plain"))
    shutil.copytree(folder / "plain", folder / "fp8")
    spec = quantized_spec(bridge.spec, SCHEME)
    save_file(in_fp8(load_file(folder / "plain" / WEIGHTS), bridge), folder / "fp8" / WEIGHTS)
    config = json.loads((folder / "fp8" / "config.json").read_text())
    config["quantization_config"] = quantization_config(spec, SCHEME, spec.hf_dtypes(torch.float32))
    (folder / "fp8" / "config.json").write_text(json.dumps(config))
    return folder


def recipe(run_dir: Path, path: Path | str, quantization: dict[str, Any] | None, **sections: Any) -> RunConfig:
    base = {
        "model": {"path": str(path), "dtype": "fp32"},
        "run_dir": run_dir,
        "steps": 2,
        "layout": {"tp": 2},
        "trainer": {"learning_rate": 1e-3, "micro_batch_size": 16},
        "algorithm": {"group_size": 4, "entropy_coefficient": 0.01},
        "rollout": {"prompts_per_step": 4, "max_tokens": 3},
        "engine": {"max_model_len": 16},
        "task": {"kind": "sums"},
        "reward": {"function": "reward_functions:length"},
        "logging": {"console": False},
        "sync": {"quantization": quantization},
    }
    return parse_config(RunConfig, base | sections)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose processor runs fp8."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


@pytest.mark.skipif(torch.cuda.is_available() or torch.cpu._is_amx_tile_supported(), reason="vLLM runs fp8 on this machine")
def test_a_machine_without_fp8_is_refused_before_anything_starts(checkpoints: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", checkpoints / "fp8", OPTION)
    with pytest.raises(ConfigError, match=r"sync.quantization: this machine has no GPU, and vLLM has no fp8.*leave it out"):
        run_training(config)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.usefixtures("with_kernels")
def test_engines_must_start_on_the_format_that_they_are_sent(checkpoints: Path, tmp_path: Path) -> None:
    prepare_run(recipe(tmp_path, checkpoints / "plain", None), resume=False)
    prepare_run(recipe(tmp_path, checkpoints / "fp8", OPTION), resume=False)
    cases = [
        (
            "plain",
            OPTION,
            r"sync.quantization=\{block: \[32, 32\]\}: engines start on model.path=\S+plain, which is a plain",
        ),
        (
            "fp8",
            {},
            r"sync.quantization=\{block: \[128, 128\]\}.* which is quantized \(quant_method=fp8, .*_size=\[32, 32\]\);",
        ),
        ("fp8", {"block": None}, r"sync.quantization=\{block: null\}: .*save_quantized\(model, DIR, Fp8\(block=None\)\)\)"),
        (
            "fp8",
            None,
            r"sends plain weights; set sync.quantization=\{block: \[32, 32\]\}, or .*mbridge-rl convert \S+fp8 D",
        ),
    ]
    for name, option, message in cases:
        with pytest.raises(ConfigError, match=message):
            prepare_run(recipe(tmp_path, checkpoints / name, option), resume=False)
    with pytest.raises(ConfigError, match=r"engines start on model.path=toy:qwen3, which is a plain checkpoint"):
        prepare_run(recipe(tmp_path, "toy:qwen3", {}), resume=False)


@pytest.mark.usefixtures("with_kernels")
def test_formats_that_no_sync_makes_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "fp8", tmp_path / "static")
    path = tmp_path / "static" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["activation_scheme"] = "static"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized \(quant_method=fp8, activation_scheme=static.*plain weights; write a pl"):
        prepare_run(recipe(tmp_path / "run", tmp_path / "static", None), resume=False)


class Fp8Engine(StandInEngine):
    """Holds weights in fp8, takes real syncs, and writes what a script says."""

    def __init__(self, state: dict[str, Tensor], config: Any) -> None:
        super().__init__(state=state, config=config)
        self._writer = WritingEngine(hashed(12, 2, 3), version=0)

    @property
    def weight_version(self) -> int:
        return self.version

    @property
    def held(self) -> str:
        """The digest of its weights."""
        return super().generate()[1]

    def generate(self, *args: Any, **options: Any) -> Any:
        self._writer.version = self.version
        return self._writer.generate(*args, **options)


def test_a_recipe_trains_with_engines_in_fp8(checkpoints: Path, tmp_path: Path) -> None:
    """Real ranks start on the dequantized checkpoint; the engine ends with the trained weights, quantized, bit for bit."""
    config = recipe(tmp_path, checkpoints / "fp8", OPTION)
    start = load_file(checkpoints / "fp8" / WEIGHTS)
    hf_config = AutoBridge.from_pretrained(checkpoints / "fp8").hf_config

    def run(rank: int) -> str:
        engine = Fp8Engine(start, hf_config)
        train_rank(config, False, lambda config, index: engine)
        return engine.held

    held = run_ranks(run, 2)[0]
    trained = load_file(tmp_path / "final" / WEIGHTS)
    expected = in_fp8(trained, AutoBridge.from_pretrained(tmp_path / "final"))
    assert expected.keys() == start.keys()
    assert held == Fp8Engine(expected, hf_config).held != Fp8Engine(start, hf_config).held
    syncs = read_syncs(tmp_path)
    assert [(sync.version, sync.verified) for sync in syncs] == [(1, True), (2, True), (3, True)]
    assert all(sync.full_nbytes < 0.4 * sum(tensor.nbytes for tensor in trained.values()) for sync in syncs)
