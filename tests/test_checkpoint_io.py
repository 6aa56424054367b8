"""Checkpoints on the disk: which bytes are read and written by whom, and what is left when it goes wrong."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankError, run_ranks
from safetensors.torch import load_file, save_file
from tiny import assert_same_state, hf_state, tiny_checkpoint
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import CheckpointError, StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor
from mbridge_rl.core.plan import View, compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.hf import publish, rectangles
from mbridge_rl.hf.checkpoint import Checkpoint
from mbridge_rl.hf.rectangles import Rectangle, read_into, write_from
from mbridge_rl.hf.writer import StagingDirectory, plan_files
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.group import RankGroup

PAGE = 4096


def live(layout: ParallelLayout, directory: Path, **options: Any) -> tuple[AutoBridge, list[nn.Module]]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, **options)
    bridge.load_weights(model)
    return bridge, model


def raised(function: Callable[[], Any]) -> str:
    """The error that `function` raises, as `Type: message`."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# Rectangles of files.


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], tuple[slice, ...], list[int]]:
    """A whole shape, a box of it, and an order of its dimensions."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 7]), max_size=2))
    sizes.insert(draw(st.integers(0, len(sizes))), draw(st.sampled_from([1, 40, 1500])))
    starts = [draw(st.integers(0, size - 1)) for size in sizes]
    box = tuple(slice(start, draw(st.integers(start + 1, size))) for start, size in zip(starts, sizes, strict=True))
    return sizes, box, draw(st.permutations(range(len(sizes))))


def as_rectangle(whole: Tensor, box: tuple[slice, ...], order: list[int], start: int) -> tuple[Rectangle, Tensor]:
    part = whole[box].permute(order)
    offset = start + part.storage_offset() * whole.element_size()
    return Rectangle(whole.dtype, offset, tuple(part.shape), tuple(part.stride())), part


DTYPES = [torch.float32, torch.bfloat16]


@given(boxes(), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([64, 5000, 8 << 20]))
@settings(max_examples=150, deadline=None)
def test_rectangles_go_in_and_out_and_touch_no_page_beside_their_own(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[list[int], tuple[slice, ...], list[int]],
    in_file: torch.dtype,
    in_memory: torch.dtype,
    aligned: bool,
    staging: int,
) -> None:
    sizes, box, order = case
    start = 8 if aligned else 1002
    whole = (torch.arange(torch.Size(sizes).numel()) % 251).to(in_file).view(sizes)
    path = tmp_path_factory.getbasetemp() / "rectangle.bin"
    content = b"\1" * start + whole.view(torch.uint8).numpy().tobytes() + b"\2" * 99
    path.write_bytes(content)
    rectangle, part = as_rectangle(whole, box, order, start)
    backing = torch.full([size + 2 for size in part.shape], -1, dtype=in_memory)
    inner = backing[tuple(slice(1, 1 + size) for size in part.shape)]
    asked: set[int] = set()
    with pytest.MonkeyPatch.context() as patch, path.open("r+b") as opened:
        patch.setattr(rectangles, "STAGING_BYTES", staging)
        patch.setattr(rectangles.os, "preadv", watched(os.preadv, asked))
        read_into(opened.fileno(), rectangle, inner)
        assert torch.equal(inner, part.to(in_memory))
        assert (backing == -1).sum() == backing.numel() - inner.numel() + (inner == -1).sum()
        assert asked <= pages_of(rectangle)
        write_from(opened.fileno(), rectangle, inner + 3)
    expected = whole.clone()
    expected[box].permute(order).copy_((inner + 3).to(in_file))
    assert path.read_bytes() == content[:start] + expected.view(torch.uint8).numpy().tobytes() + b"\2" * 99


def watched(real: Callable[..., int], asked: set[int]) -> Callable[..., int]:
    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        got = real(descriptor, buffers, position)
        asked.update(range(position // PAGE, (position + max(got, 1) - 1) // PAGE + 1))
        return got

    return preadv


def pages_of(rectangle: Rectangle) -> set[int]:
    positions = torch.tensor(rectangle.start)
    for size, stride in zip(rectangle.shape, rectangle.strides, strict=True):
        positions = positions[..., None] + torch.arange(size) * stride * rectangle.dtype.itemsize
    first, last = positions // PAGE, (positions + rectangle.dtype.itemsize - 1) // PAGE
    return {*first.flatten().tolist(), *last.flatten().tolist()}


# Loading.

# Rows of 32 KiB: what tensor parallelism cuts out of them are whole pages. KV heads are wide for the same reason.
WIDE = {"hidden_size": 256, "intermediate_size": 8192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2048}
LAYOUT = ParallelLayout(tp=2, pp=2)


def read_bytes() -> int:
    """What this process made the kernel fetch from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def forget(directory: Path) -> None:
    """Drops the files of a directory from the page cache."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def count_bytes_of_a_load(rank: int, directory: Path) -> tuple[int, int, int]:
    """Bytes that this rank keeps, asked the file for, and caused to be read from storage with nothing of it cached."""
    bridge, model = live(LAYOUT, directory)
    requested = [0]
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        got = real(descriptor, buffers, position)
        requested[0] += got
        return got

    dist.barrier()
    forget(directory)
    dist.barrier()
    before = read_bytes()
    os.preadv = preadv
    bridge.load_weights(model)
    os.preadv = real
    kept = sum(parameter.numel() * parameter.element_size() for chunk in model for parameter in chunk.parameters())
    return kept, requested[0], read_bytes() - before


@pytest.mark.slow
def test_ranks_read_what_they_keep_and_no_more(tmp_path: Path) -> None:
    """Each from its files, and all of them together from storage, of which they share the page cache."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3", **WIDE)
    ranks = run_ranks(count_bytes_of_a_load, 4, directory)
    for kept, requested, _ in ranks:
        assert kept > 10e6
        assert 0.9 * kept < requested <= 1.02 * kept
    stored = sum(stored for _, _, stored in ranks)
    if stored == 0:
        pytest.skip("this file system does not account for what it reads")
    assert 0.9 < stored / sum(kept for kept, _, _ in ranks) <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_alone_on_its_machine_reads_its_own_pages_only(rank: int, tmp_path: Path) -> None:
    """Nothing is read ahead: storage gives the pages that hold what the rank keeps."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3", **WIDE)
    spec = AutoBridge.from_pretrained(directory).spec
    side = megatron_side(spec, LAYOUT, rank)
    plan = compile_plan(spec, hf_side(spec), side)
    targets = {name: torch.zeros(shape) for name, shape in side.shapes.items()}
    checkpoint, asked = Checkpoint(directory), set()
    forget(directory)
    before = read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangles.os, "preadv", watched(os.preadv, asked))
        checkpoint.load(plan, targets, read_ahead=False)
    stored, kept = read_bytes() - before, sum(target.nbytes for target in targets.values())
    if stored == 0:
        pytest.skip("this file system does not account for what it reads")
    assert stored <= 1.02 * len(asked) * PAGE
    assert stored <= 1.3 * kept  # pages at both ends of 16 KiB runs
    whole = hf_state(directory)
    assert all(
        torch.equal(copy.target.of(targets[copy.target.name], copy.shape), copy.source.of(whole[copy.source.name], copy.shape))
        for copy in plan.copies
    )


def payloads_of(function: Callable[[], None]) -> list[tuple[str, int]]:
    """Every call of torch.distributed, and how many bytes its first tensor holds."""
    calls: list[tuple[str, int]] = []
    names = [name for name in dir(dist) if re.match(r"(all_|broadcast|gather|scatter|reduce|send|recv|barrier|batch_)", name)]
    real = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in args if isinstance(value, Tensor)]
            calls.append((name, tensors[0].nbytes if tensors else -1))
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(dist, name, recorded(name))
    try:
        function()
    finally:
        for name in real:
            setattr(dist, name, real[name])
    return calls


def collectives_of_save_and_load(rank: int, directory: Path) -> list[list[tuple[str, int]]]:
    bridge, model = live(LAYOUT, directory)
    bridge.save_pretrained(model, directory / "saved")
    return [
        payloads_of(lambda: bridge.save_pretrained(model, directory / "saved")),
        payloads_of(lambda: bridge.load_weights(model, directory / "saved")),
    ]


def test_no_payload_is_communicated(tmp_path: Path) -> None:
    """Only flags of 8 bytes, a handful, that tell whether a rank has failed."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for calls in run_ranks(collectives_of_save_and_load, 4, directory):
        for of_one in calls:
            assert 1 <= len(of_one) <= 8
            assert set(of_one) == {("all_reduce", 8)}


def load_from(rank: int, directory: Path, sources: list[Path]) -> tuple[str, bool]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    before = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    error = raised(lambda: bridge.load_weights(model, sources[rank]))
    return error, all(map(torch.equal, before, (parameter for chunk in model for parameter in chunk.parameters())))


def test_what_one_rank_finds_wrong_stops_all(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path / "good", "llama")
    other, _ = tiny_checkpoint(tmp_path / "other", "llama", seed=1)
    bad, _ = tiny_checkpoint(tmp_path / "bad", "llama", seed=1)
    state = hf_state(bad)
    del state["model.norm.weight"]
    save_file(state, bad / "model.safetensors")
    first, second = run_ranks(load_from, 2, directory, [other, bad])
    assert first[0].startswith(f"{StateMismatchError.__name__}: rank 0: rank 1 failed: StateMismatchError")
    assert "missing model.norm.weight" in first[0]
    assert "missing model.norm.weight" in second[0]
    assert first[1]
    assert second[1]


def flip(file: Path, position: int, value: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        opened.write(value)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda file: os.truncate(file, file.stat().st_size // 2), "is truncated or corrupt"),
    "one byte short": (lambda file: os.truncate(file, file.stat().st_size - 1), "is truncated or corrupt"),
    "cut in the header": (lambda file: os.truncate(file, 100), "is truncated or corrupt"),
    "empty": (lambda file: os.truncate(file, 0), "is truncated or corrupt"),
    "header length": (lambda file: flip(file, 0, b"\xff" * 8), "is truncated or corrupt"),
    "header": (lambda file: flip(file, 8, b"garbage"), "is truncated or corrupt"),
    "longer than it says": (lambda file: file.open("ab").write(b"\0" * 64), "is truncated or corrupt"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_refused_by_their_headers(name: str, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    DAMAGES[name][0](directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=DAMAGES[name][1]):
        Checkpoint(directory)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    index = directory / "model.safetensors.index.json"
    for text in ("", "[]", "{}", '{"weight_map": '):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="is not a safetensors index"):
            Checkpoint(directory)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """No bus error, as reading it through a mapping would give."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    checkpoint = Checkpoint(directory)
    target = torch.empty(515, 64)
    name, last = "model.embed_tokens.weight", "model.norm.weight"
    checkpoint.read_into(View(name, 0, (64, 1)), (515, 64), target)
    assert torch.equal(target, hf_state(directory)[name])
    os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size // 2)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {re.escape(last)} cannot be read .*bytes too early"):
        checkpoint.read_into(View(last, 0, (1,)), (64,), torch.empty(64))


# Saving.


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def save_both_ways(rank: int, directory: Path) -> tuple[bool, bool]:
    bridge, model = live(ParallelLayout(tp=2, pp=2), directory)
    bridge.save_pretrained(model, directory / "mapped", shard_bytes=1 << 18)
    RankGroup.on_one_machine = False
    bridge.save_pretrained(model, directory / "written", shard_bytes=1 << 18)
    bridge.save_pretrained(model, directory / "cast", dtype=torch.bfloat16)
    return (directory / "mapped").exists(), (directory / ".mapped.incomplete").exists()


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
    mapped = staging.create(mapped=True)
    for name, tensor in state.items():
        staging.write(View(name, 0, tensor.stride()), tuple(tensor.shape), tensor, mapped=mapped)
    staging.finish()
    staging.publish()
    assert_same_state(load_file(tmp_path / "saved" / "model.safetensors"), state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in Checkpoint(tmp_path / "saved").items())


# Where the checkpoint takes its place.


def staged(directory: Path, **files: str) -> Path:
    path = directory.parent / f".{directory.name}.incomplete"
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


NEW = {"model__safetensors": "new", "config__json": "new"}


def texts(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir() if path.is_file()}


def test_a_checkpoint_replaces_weights_and_leaves_other_files(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "notes.txt"):
        (directory / name).write_text("old")
    publish.replace_directory(staged(directory, **NEW), directory, durable=True)
    assert texts(directory) == {"model.safetensors": "new", "config.json": "new", "notes.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_directories_inside_are_left_where_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    (directory / "optimizer").mkdir(parents=True)
    (directory / "optimizer" / "state").write_text("precious")
    (directory / "model.safetensors").write_text("old")
    publish.replace_directory(staged(directory, **NEW), directory, durable=False)
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


# Saves that do not end well.


def fill(model: list[nn.Module], value: float) -> None:
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.fill_(value)


def value_of(directory: Path) -> float:
    """The one number that all tensors of a complete checkpoint consist of; raises CheckpointError for an incomplete one."""
    checkpoint = Checkpoint(directory)
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert len(checkpoint) == 39
    values = {value for tensor in checkpoint.values() for value in tensor.unique().tolist()}
    assert len(values) == 1, f"a mixture of {values}"
    return values.pop()


def die_at(rank: int, directory: Path, module: str, name: str, calls: int) -> None:
    """Rank 0 is killed at the given call while the second checkpoint replaces the first."""
    import importlib

    bridge, model = live(ParallelLayout(tp=2), directory)
    target = directory / "saved"
    fill(model, 1)
    bridge.save_pretrained(model, target, shard_bytes=1 << 18)
    fill(model, 2)
    owner, _, attribute = name.rpartition(".")
    place = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    real, seen = getattr(place, attribute), count(1)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if rank == 0 and next(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(place, attribute, deadly)
    bridge.save_pretrained(model, target, shard_bytes=1 << 18)


WRITER, PUBLISH = "mbridge_rl.hf.writer", "mbridge_rl.hf.publish"


@pytest.mark.parametrize(
    ("module", "name", "calls", "value"),
    [
        (WRITER, "_reserve", 2, 1),
        (WRITER, "StagingDirectory.write", 1, 1),
        (WRITER, "StagingDirectory.write", 9, 1),
        (WRITER, "StagingDirectory.publish", 1, 1),
        (PUBLISH, "_sync_files", 1, 1),
        (PUBLISH, "_exchange_keeping_other_files", 1, 1),
        (PUBLISH, "shutil.rmtree", 2, 2),
    ],
)
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new(
    module: str, name: str, calls: int, value: int, tmp_path: Path
) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(RankError, match=r"rank 0 of 2 failed:\s*died with status 9"):
        run_ranks(die_at, 2, directory, module, name, calls, timeout=60)
    assert value_of(directory / "saved") == value
    run_ranks(save_again, 2, directory)
    assert value_of(directory / "saved") == 3
    assert not (directory / ".saved.incomplete").exists()


def save_again(rank: int, directory: Path) -> None:
    bridge, model = live(ParallelLayout(tp=2), directory)
    fill(model, 3)
    bridge.save_pretrained(model, directory / "saved")


@pytest.mark.parametrize("calls", range(1, 8))
def test_filling_file_by_file_never_looks_complete_half_way(calls: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Where directories cannot be exchanged: what is interrupted is no checkpoint at all, neither the old one nor a mixture."""
    old, _ = tiny_checkpoint(tmp_path / "old", "llama")
    new, _ = tiny_checkpoint(tmp_path / "new", "llama", seed=1)
    both = {"old": hf_state(old), "new": hf_state(new)}
    seen = count(1)

    def interrupted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(seen) == calls:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(publish, "_exchange_keeping_other_files", lambda staged, directory: False)
    monkeypatch.setattr(Path, "replace", interrupted(Path.replace))
    monkeypatch.setattr(Path, "unlink", interrupted(Path.unlink))
    try:
        publish.replace_directory(new, old, durable=False)
    except KeyboardInterrupt:
        try:
            state = dict(Checkpoint(old))
        except CheckpointError:
            return
        assert_same_state(state, both["old"])
    else:
        assert_same_state(dict(Checkpoint(old)), both["new"])


def save_forever(rank: int, directory: Path, alive: int) -> None:
    bridge, model = live(ParallelLayout(tp=2), directory)
    for value in count(1):
        fill(model, value)
        bridge.save_pretrained(model, directory / "saved", shard_bytes=1 << (18 if value % 2 else 30), durable=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killing_all_ranks_at_any_moment_leaves_a_whole_checkpoint(seed: int, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    ended, alive = os.pipe()  # reading `ended` returns when no process holds `alive` any more
    launcher = os.fork()
    if launcher == 0:
        os.close(ended)
        try:
            run_ranks(save_forever, 2, directory, alive, timeout=100)
        finally:
            os._exit(1)
    os.close(alive)
    deadline = time.monotonic() + 60
    while not (directory / "saved" / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    os.kill(launcher, signal.SIGKILL)  # its ranks die with it
    os.waitpid(launcher, 0)
    assert os.read(ended, 1) == b""
    os.close(ended)
    assert value_of(directory / "saved") >= 1


def save_with_a_limit(rank: int, directory: Path, limited: int, mapped: bool) -> str:
    """Rank `limited` must not write files of more than 100 kB; the kernel answers as for a full disk."""
    bridge, model = live(ParallelLayout(tp=2), directory)
    fill(model, 1)
    bridge.save_pretrained(model, directory / "saved")
    fill(model, 2)
    if not mapped:
        RankGroup.on_one_machine = False
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    error = raised(lambda: bridge.save_pretrained(model, directory / "saved"))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return error


@pytest.mark.parametrize(("limited", "mapped"), [(0, True), (0, False), (1, False)])
def test_what_one_rank_cannot_write_stops_all(limited: int, mapped: bool, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for rank, error in enumerate(run_ranks(save_with_a_limit, 2, directory, limited, mapped)):
        assert error.startswith(CheckpointError.__name__)
        assert "File too large" in error
        assert (f"rank {limited} failed: CheckpointError" in error) == (rank != limited)
    assert not (directory / ".saved.incomplete").exists()
    assert value_of(directory / "saved") == 1


_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000


def mount_small_disk(path: Path, nbytes: int) -> bool:
    """A RAM disk of `nbytes` at `path`, seen by this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNS if os.getuid() == 0 else _CLONE_NEWNS | _CLONE_NEWUSER
    path.mkdir()
    return libc.unshare(flags) == 0 and libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, f"size={nbytes}".encode()) == 0


def save_to_full_disk(rank: int, directory: Path, disk: Path, mapped: bool) -> tuple[str, list[str], float]:
    bridge, model = live(ParallelLayout(tp=2), directory)
    if not mapped:
        RankGroup.on_one_machine = False
    fill(model, 1)
    bridge.save_pretrained(model, disk / "saved", dtype=torch.bfloat16)
    fill(model, 2)
    error = raised(lambda: bridge.save_pretrained(model, disk / "saved"))
    return error, sorted(path.name for path in disk.iterdir()), value_of(disk / "saved")


@pytest.mark.parametrize("mapped", [True, False])
def test_a_full_disk_is_an_error_on_every_rank(mapped: bool, tmp_path: Path) -> None:
    """Room for the checkpoint in bf16 and for half of the one in fp32 that is to replace it."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    nbytes = sum(tensor.nbytes for tensor in hf_state(directory).values())
    report = tmp_path / "report"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if mount_small_disk(tmp_path / "disk", nbytes):
                torch.save(run_ranks(save_to_full_disk, 2, directory, tmp_path / "disk", mapped, timeout=60), report)
                status = 0
            else:
                status = 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 2:
        pytest.skip("no file system may be mounted here")
    assert status == 0
    for error, names, value in torch.load(report):
        assert error.startswith(CheckpointError.__name__)
        assert "No space left on device" in error
        assert f"it needs {nbytes + header_bytes(directory)} bytes" in error
        assert names == ["saved"]
        assert value == 1


def header_bytes(directory: Path) -> int:
    tensors = [HFTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in hf_state(directory).items()]
    return len(plan_files(tensors)[0].header)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    (tmp_path / "file").write_text("")
    for error in run_ranks(save_below_a_file, 2, directory):
        assert "CheckpointError" in error
        assert "Not a directory" in error


def save_below_a_file(rank: int, directory: Path) -> str:
    bridge, model = live(ParallelLayout(tp=2), directory)
    return raised(lambda: bridge.save_pretrained(model, directory / "file" / "saved"))
