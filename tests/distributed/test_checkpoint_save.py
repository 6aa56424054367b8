"""Saving a checkpoint: which bytes are written by whom, and where the checkpoint takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live import live
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import assert_same_state, hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import View
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.publish import Replacement
from mbridge_rl.hf.writer import StagingDirectory, plan_files


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def save_both_ways(rank: int, directory: Path) -> tuple[bool, bool]:
    bridge, model = live(ParallelLayout(tp=2, pp=2), directory)
    bridge.save_pretrained(model, directory / "mapped", shard_bytes=1 << 18)
    RankGroup.on_one_machine = False
    bridge.save_pretrained(model, directory / "written", shard_bytes=1 << 18)
    bridge.save_pretrained(model, directory / "cast", dtype=torch.bfloat16)
    return (directory / "mapped").exists(), any(directory.glob(".*"))


def test_files_are_the_same_mapped_or_written(tmp_path: Path) -> None:
    """Written is how ranks on several machines do it."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe")
    assert run_ranks(save_both_ways, 4, directory) == [(True, False)] * 4
    mapped = files_of(directory / "mapped")
    assert len([name for name in mapped if name.endswith(".safetensors")]) > 3
    assert files_of(directory / "written") == mapped
    assert_same_state(hf_state(directory / "mapped"), hf_state(directory))
    rounded = {name: tensor.bfloat16() for name, tensor in hf_state(directory).items()}
    assert_same_state(hf_state(directory / "cast"), rounded)


def bytes_written(rank: int, directory: Path, layout: ParallelLayout) -> int:
    bridge, model = live(layout, directory)
    written = [0]
    real = StagingDirectory.write

    def write(staging: StagingDirectory, view: View, shape: tuple[int, ...], source: Tensor, *, mapped: bool) -> None:
        written[0] += source.numel() * source.element_size()
        real(staging, view, shape, source, mapped=mapped)

    StagingDirectory.write = write
    bridge.save_pretrained(model, directory / "saved")
    return written[0]


@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(dp=4), ParallelLayout(tp=2, dp=2), ParallelLayout(cp=2, dp=2), ParallelLayout(ep=2, dp=4)],
    ids=str,
)
def test_writing_is_shared_evenly_and_nothing_is_written_twice(layout: ParallelLayout, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe")
    written = run_ranks(bytes_written, layout.world_size, directory, layout)
    total = sum(tensor.nbytes for tensor in hf_state(directory).values())
    assert sum(written) == total
    assert max(written) <= 1.1 * total / len(written)


def test_dtypes_of_all_sizes_share_a_file(tmp_path: Path) -> None:
    """Odd counts of bf16 before fp32: the format wants every tensor aligned."""
    state = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5, 7), "c": torch.randn(1).half(), "d": torch.randn(3).double()}
    tensors = [HFTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    staging = StagingDirectory(tmp_path / "saved", plan_files(tensors))
    mapped = staging.create(mapped=True).mapped
    for name, tensor in state.items():
        staging.write(View(name, 0, tensor.stride()), tuple(tensor.shape), tensor, mapped=mapped)
    staging.prove(staging.finish())
    staging.publish()
    assert_same_state(load_file(tmp_path / "saved" / "model.safetensors"), state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in Checkpoint(tmp_path / "saved").items())


# Where the checkpoint takes its place.


def replace(directory: Path, files: dict[str, str], *, durable: bool) -> None:
    replacement = Replacement(directory)
    replacement.begin()
    for name, text in files.items():
        (replacement.path / name).write_text(text)
    replacement.publish(durable=durable)
    replacement.end()


NEW = {"model.safetensors": "new", "config.json": "new"}


def texts(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


def test_a_checkpoint_replaces_weights_and_leaves_other_files(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "notes.txt"):
        (directory / name).write_text("old")
    replace(directory, NEW, durable=True)
    assert texts(directory) == {"model.safetensors": "new", "config.json": "new", "notes.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_directories_inside_are_left_where_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    (directory / "optimizer").mkdir(parents=True)
    (directory / "optimizer" / "state").write_text("precious")
    (directory / "model.safetensors").write_text("old")
    replace(directory, NEW, durable=False)
    assert texts(directory) == {"model.safetensors": "new", "config.json": "new"}
    assert (directory / "optimizer" / "state").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def save_to_link(rank: int, directory: Path) -> None:
    bridge, model = live(ParallelLayout(tp=2), directory)
    bridge.save_pretrained(model, directory / "link")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path / "source", "llama")
    (tmp_path / "real").mkdir()
    (directory / "link").symlink_to(tmp_path / "real")
    run_ranks(save_to_link, 2, directory)
    assert (directory / "link").is_symlink()
    assert_same_state(hf_state(tmp_path / "real"), hf_state(directory))
