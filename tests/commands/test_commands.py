"""The commands plan, inspect, convert and verify, as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_same_state, hf_state, tiny_checkpoint
from typer.testing import CliRunner, Result

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.cli import app
from mbridge_rl.commands.arguments import readable, size_in_bytes, stages, with_stages
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.dequantize import Dequantized

MOE = "qwen3-moe-tied"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", MOE)[0]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fails(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.replace("│", " ").split())


KIMI = ("plan", "kimi-k2", "--trainer", "tp=8,pp=16,ep=64,etp=1,dp=8", "--rollout", "tp=16,replicas=8")


def test_plan_of_a_trillion_parameters() -> None:
    plan = json.loads(succeeds(*KIMI, "--json"))
    assert (plan["trainer_ranks"], plan["rollout_ranks"], plan["parameters"] // 10**9) == (1024, 128, 1026)
    estimate = plan["estimate"]
    assert estimate["received"]["minimum"] == estimate["received"]["maximum"]
    assert 128e9 < estimate["received"]["maximum"] < 131e9  # a 16th of 2.05 TB, and the tensors that are not sharded
    assert estimate["entered"]["total"] == estimate["sent"]["total"] == 16 * estimate["received"]["maximum"]
    assert estimate["lower_bound_seconds"] == pytest.approx(estimate["received"]["maximum"] / 50e9)
    assert max(estimate["trainer_staging"], estimate["rollout_staging"]) <= 2 * (256 << 20)


def test_plan_of_one_rank() -> None:
    plan = json.loads(succeeds(*KIMI, "--rank", 1030, "--json"))
    received = sum(exchange["nbytes"] for exchange in plan["exchanges"] if not exchange["sends"])
    assert received == plan["estimate"]["received"]["maximum"]
    output = succeeds(*KIMI, "--rank", 1030)
    assert "rank 1030 (engine 0, rank 6) receives 130.34 GB" in output
    assert "rank 1142 (engine 7, rank 6)" in output
    assert "there are 1024 trainer and 128 rollout ranks" in fails(*KIMI, "--rank", 1152)


def test_plan_of_a_checkpoint(checkpoint: Path) -> None:
    layouts = ("--trainer", "tp=2,pp=2,stages=1x1+3x1", "--rollout", "tp=8", "--dtype", "fp32", "--bucket", "64KiB")
    quick = json.loads(succeeds("plan", checkpoint, *layouts, "--json"))
    exact = json.loads(succeeds("plan", checkpoint, *layouts, "--json", "--exact"))
    assert quick["estimate"]["received"] == exact["estimate"]["received"]
    assert quick["model_bytes"] == sum(tensor.nbytes for tensor in hf_state(checkpoint).values())
    assert "stage_layers=(1, 3)" in quick["trainer"]
    assert quick["fingerprint"] != exact["fingerprint"]
    again = json.loads(succeeds("plan", checkpoint / "config.json", *layouts, "--json"))
    assert again["fingerprint"] == quick["fingerprint"]
    table = succeeds("plan", checkpoint, *layouts)
    assert " 0.0 B parameters" not in table
    assert " M parameters in " in table
    assert "a trainer rank sends" in table
    assert "prediction" in table


def test_plan_takes_what_megatron_takes(checkpoint: Path) -> None:
    def fingerprint(trainer: str) -> str:
        return json.loads(succeeds("plan", checkpoint, "--trainer", trainer, "--json"))["fingerprint"]

    assert fingerprint("tp=2,stages=E,t|(t|)*2tL,pp=4") == fingerprint("tp=2,pp=4,stages=1x4") == fingerprint("tp=2,pp=4")
    assert fingerprint("pp=3,stages=E|tt|ttL") == fingerprint("pp=3,stages=0+2+2") != fingerprint("pp=3")
    assert fingerprint("pp=2,last_stage_layers=1") == fingerprint("pp=2,stages=3+1")
    assert fingerprint("pp=3,embedding_as_layer=1,loss_as_layer=1") == fingerprint("pp=3,stages=1+2+1")


def test_plan_says_what_is_wrong() -> None:
    trainer = ("plan", "kimi-k2", "--trainer")
    assert "did you mean etp=1?" in fails(*trainer, "tp=8,pp=16,ep=64,dp=8")
    assert "2 numbers, found 5" in fails(*trainer, "pp=2,stages=10x5")
    assert "must sum up to the model's 61 layers" in fails(*trainer, "pp=2,stages=30x2")
    assert "at most once" in fails(*trainer, "tp=8,tp=4", code=2)
    assert "whole number" in fails(*trainer, "tp=two", code=2)
    assert "4x13+3x3" in fails(*trainer, "pp=2,stages=4*13", code=2)
    assert "64 attention heads do not divide" in fails("plan", "kimi-k2", "--rollout", "tp=48")
    assert "ep=3 must divide" in fails("plan", "kimi-k2", "--rollout", "tp=2,ep=3")
    assert "Bundled names are" in fails("plan", "./no-such-model")


def test_plan_of_an_engine_cuts_experts_with_biases(tmp_path: Path) -> None:
    """vLLM can cut experts with biases and Megatron can't, so no message advises what an engine's options can't express."""
    from families import FAMILIES

    FAMILIES["gpt-oss"].hf_config().save_pretrained(tmp_path)
    trainer = ("plan", tmp_path, "--trainer", "tp=2,ep=2,etp=1")
    estimates = [json.loads(succeeds(*trainer, "--rollout", layout, "--json"))["estimate"] for layout in ("tp=2", "tp=2,ep=2")]
    bytes_of_cut_experts, bytes_of_full_experts = (estimate["received"]["maximum"] for estimate in estimates)
    # A worker receives half of the experts' bytes either way, but for biases.
    assert bytes_of_cut_experts == pytest.approx(bytes_of_full_experts, rel=0.05)
    message = fails(*trainer, "--rollout", "tp=1,dp=5")
    assert "linear_fc1.weight" in message
    assert "An engine's etp is tp*dp/ep = 1*5/1" in message
    assert "use etp=1" in fails("plan", tmp_path, "--trainer", "tp=2")  # a trainer has this option


def test_advice_about_stages_names_the_option() -> None:
    message = fails("plan", "kimi-k2", "--trainer", "pp=4,embedding_as_layer=1")
    assert "state the split: stages=" in message
    assert "stage_layers" not in message
    message = fails("inspect", "kimi-k2", "--pp", "2", "--stages", "30x2", "--first-stage-layers", "30")
    assert "say in one way how layers are dealt: stages" in message


def test_inspect_prints_the_table(checkpoint: Path) -> None:
    rows = {row["megatron_name"]: row for row in json.loads(succeeds("inspect", checkpoint, "--json"))["tensors"]}
    spec = AutoBridge.from_pretrained(checkpoint).spec
    assert rows.keys() == {rule.megatron_name for rule in spec.rules if rule.layers != ()}
    qkv = rows["decoder.layers.{layer}.self_attention.linear_qkv.weight"]
    assert qkv["megatron_shape"] == [(8 + 4 + 4) * 24, 64]
    assert [part["shape"] for part in qkv["hf"]] == [[192, 64], [96, 64], [96, 64]]
    assert qkv["cut"] == "tp: rows, 4 groups"
    assert rows["decoder.layers.{layer}.mlp.experts.linear_fc2.weight{expert}"]["cut"] == "ep: experts, etp: columns"
    output = succeeds("inspect", checkpoint, "--tp", 2, "--ep", 2)
    assert "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight" in output
    assert "outside of a world of 5" in fails("inspect", checkpoint, "--pp", 5, "--loss-as-layer", "--rank", 5)
    assert "258x64" in output  # half of the vocabulary, padded


def test_inspect_of_one_rank_is_what_it_holds(checkpoint: Path) -> None:
    layout = ParallelLayout(tp=2, pp=2, ep=2, etp=1)
    bridge = AutoBridge.from_pretrained(checkpoint)
    shards = bridge.shard(hf_state(checkpoint), layout)
    layout_options = ("--tp", 2, "--pp", 2, "--ep", 2, "--etp", 1)
    for rank in range(4):
        rows = json.loads(succeeds("inspect", checkpoint, *layout_options, "--rank", rank, "--json"))["tensors"]
        assert {row["megatron_name"]: row["shape"] for row in rows} == {n: list(t.shape) for n, t in shards[rank].items()}
    assert "model.layers.2.self_attn.k_proj.weight[72:96, 0:64]" in succeeds(
        "inspect", checkpoint, *layout_options, "--rank", 3
    )
    assert "outside of a world of 4 ranks" in fails("inspect", checkpoint, *layout_options, "--rank", 4)


def test_convert_there_over_and_back(checkpoint: Path, tmp_path: Path) -> None:
    """HF to one layout, to another, and to HF in many files: bit for bit, with what belongs to the checkpoint."""
    (checkpoint / "tokenizer.json").write_text("{}")
    first, second, back = tmp_path / "first", tmp_path / "second", tmp_path / "back"
    assert "8 Megatron ranks" in succeeds("convert", checkpoint, first, "--tp", 2, "--pp", 2, "--ep", 4, "--etp", 1)
    layout = ParallelLayout(tp=2, pp=2, ep=4, etp=1, dp=2)
    shards = AutoBridge.from_pretrained(checkpoint).shard(hf_state(checkpoint), layout)
    for rank, shard in shards.items():
        assert_same_state(load_file(first / f"rank-{rank:05}.safetensors"), shard)
    succeeds("convert", first, second, "--pp", 3, "--stages", "Et*2|t|tL")
    succeeds("convert", second, back, "--shard", "200kB")
    assert_same_state(hf_state(back), hf_state(checkpoint))
    assert len(list(back.glob("*.safetensors"))) > 2
    assert (back / "tokenizer.json").exists()
    assert AutoBridge.from_pretrained(back).spec.fingerprint == AutoBridge.from_pretrained(checkpoint).spec.fingerprint
    assert not list(tmp_path.glob(".*"))


def test_convert_casts(checkpoint: Path, tmp_path: Path) -> None:
    succeeds("convert", checkpoint, tmp_path / "ranks", "--to", "megatron", "--dtype", "bf16")
    succeeds("convert", tmp_path / "ranks", tmp_path / "back")
    assert_same_state(hf_state(tmp_path / "back"), {name: tensor.bfloat16() for name, tensor in hf_state(checkpoint).items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.fixture
def ranks(checkpoint: Path, tmp_path: Path) -> Path:
    succeeds("convert", checkpoint, tmp_path / "ranks", "--tp", 2)
    return tmp_path / "ranks"


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_convert_refuses_what_is_not_whole(ranks: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        assert message in fails("convert", ranks, tmp_path / "target")
        assert not (tmp_path / "target").exists()

    last = ranks / "rank-00001.safetensors"
    content = last.read_bytes()
    last.write_bytes(content[:-10])
    refused("rank-00001.safetensors is truncated or corrupt")
    last.unlink()
    refused("rank-00001.safetensors is missing")
    tensors = load_file(ranks / "rank-00000.safetensors")
    name = "decoder.final_layernorm.weight"
    save_file({other: tensor for other, tensor in tensors.items() if other != name}, last)
    refused(f"lacks [{name}]")
    save_file(tensors | {name: torch.zeros(3)}, last)
    refused(f"{name} has shape [3], the layout says [64]")
    last.write_bytes(content)
    edited(ranks / "config.json", num_hidden_layers=3)
    refused("was the config changed?")
    edited(ranks / "layout.json", format="another")
    refused("has format 'another'")


def test_convert_leaves_other_directories_alone(checkpoint: Path, ranks: Path, tmp_path: Path) -> None:
    before = hf_state(checkpoint)
    assert "there already and not empty" in fails("convert", ranks, checkpoint)
    assert "there already and not empty" in fails("convert", checkpoint, ranks, "--tp", 4)
    assert "has no layout" in fails("convert", checkpoint, tmp_path / "x", "--to", "hf", "--tp", 2, code=2)
    assert "do not divide by tp=3" in fails("convert", checkpoint, tmp_path / "x", "--tp", 3)
    assert_same_state(hf_state(checkpoint), before)
    assert not (tmp_path / "x").exists()


def verified(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Runs `verify` in this process and returns its output. Ranks need output files with descriptors, CliRunner has none."""
    with pytest.raises(SystemExit) as end:
        app(["verify", *map(str, arguments), "--timeout", "120"])
    captured = capfd.readouterr()
    assert end.value.code == code, captured
    return captured.out


@pytest.mark.parametrize(
    "layout", [("--tp", 2, "--ep", 2, "--etp", 1), ("--pp", 2, "--cp", 2, "--first-stage-layers", 3)], ids=str
)
def test_verify(checkpoint: Path, layout: tuple[object, ...], capfd: pytest.CaptureFixture[str]) -> None:
    output = verified(capfd, checkpoint, *layout)
    assert "import, export  equal" in output
    assert "logits          equal" in output
    assert "100.0% of positions" in output


def test_verify_tells_logits_that_differ(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "logits          different" in verified(capfd, checkpoint, "--tolerance", 0, code=1)


def test_verify_refuses_another_config(checkpoint: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    edited(changed / "config.json", num_hidden_layers=3)
    assert "does not match Qwen3MoeForCausalLM: unexpected model.layers.3" in fails("verify", changed)


def test_verify_names_tensors_that_differ(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`verify` names the one tensor of which one bit was changed between import and export."""
    load_weights = AutoBridge.load_weights

    def careless(bridge: AutoBridge, model: Any) -> None:
        load_weights(bridge, model)
        weight = next(p for name, p in model[0].named_parameters() if name.endswith("layers.2.mlp.router.weight"))
        weight.data.view(torch.int32)[1, 2] ^= 1

    monkeypatch.setattr(AutoBridge, "load_weights", careless)
    output = verified(capfd, checkpoint, "--no-logits", code=1)
    assert f"1 of {len(hf_state(checkpoint))} tensors differ" in output
    assert "model.layers.2.mlp.gate.weight" in output


def test_sizes_and_stages() -> None:
    assert [size_in_bytes(text) for text in ("1", "64MB", "256MiB", "1.5gib")] == [1, 64 * 10**6, 256 << 20, 3 << 29]
    assert [readable(n) for n in (12, 2_500, 130e9, 2e12)] == ["12 B", "2.50 kB", "130.00 GB", "2.00 TB"]
    assert stages("4x13+3x3") == {"stage_layers": (4,) * 13 + (3,) * 3}
    assert stages("Et*3|tL") == {"pipeline_layout": "Et*3|tL"}
    assert with_stages({"pp": 4, "vpp": 2}, 61).stage_layers == (8, 8, 8, 8, 8, 7, 7, 7)
    assert with_stages({"pp": 4}, 64).stage_layers is None
    assert with_stages({"pp": 4, "first_stage_layers": 1}, 61).layers_of_stages(61) == (1, 20, 20, 20)


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    directory, _ = tiny_checkpoint(tmp_path / "fp8", "llama")
    state = {name: tensor.bfloat16() for name, tensor in hf_state(directory).items()}
    for name in [name for name in state if name.endswith("_proj.weight")]:
        rows, columns = state[name].shape
        state[f"{name}_scale_inv"] = torch.rand(-(-rows // 32), -(-columns // 32)) + 0.5
        state[name] = state[name].to(torch.float8_e4m3fn)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    edited(directory / "config.json", quantization_config=FP8, dtype="bfloat16")
    return directory


def test_quantized_checkpoints_are_converted_to_what_they_stand_for(quantized: Path, tmp_path: Path) -> None:
    plain = Dequantized(Checkpoint(quantized), FP8, torch.bfloat16)
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in plain.tensors.items()}
    assert described == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in plain.items()}
    succeeds("convert", quantized, tmp_path / "ranks", "--tp", 2)
    succeeds("convert", tmp_path / "ranks", tmp_path / "back")
    assert_same_state(hf_state(tmp_path / "back"), dict(plain))
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_quantized_checkpoints_are_verified_without_logits(quantized: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = verified(capfd, quantized, "--tp", 2)
    assert "import, export  equal" in output
    assert "not compared" in output
