"""Loading a checkpoint: which bytes are read by whom, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live import live, raised
from pages import PAGE, watched
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import CheckpointError, StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.plan import View, compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.hf import rectangles
from mbridge_rl.hf.checkpoint import Checkpoint

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


def count_bytes_of_a_load(rank: int, directory: Path, layout: ParallelLayout) -> tuple[int, int, int, int]:
    """How many bytes this rank holds, requested from the file and caused to be read from storage (nothing was cached), and the
    number of its read calls."""
    bridge, model = live(layout, directory)
    requested, calls = [0], [0]
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        got = real(descriptor, buffers, position)
        requested[0] += got
        calls[0] += 1
        return got

    dist.barrier()
    forget(directory)
    dist.barrier()
    before = read_bytes()
    os.preadv = preadv
    bridge.load_weights(model)
    os.preadv = real
    held = sum(parameter.numel() * parameter.element_size() for chunk in model for parameter in chunk.parameters())
    return held, requested[0], read_bytes() - before, calls[0]


READS = {
    "dense": ("qwen3", WIDE, LAYOUT),
    "experts": ("qwen3-moe", {"hidden_size": 512, "moe_intermediate_size": 512}, ParallelLayout(pp=2, ep=2, dp=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READS)
def test_ranks_read_what_they_keep_and_no_more(kind: str, tmp_path: Path) -> None:
    """Each rank requests little more than it holds, and storage is read once: the ranks share the page cache."""
    variant, sizes, layout = READS[kind]
    directory, _ = tiny_checkpoint(tmp_path, variant, **sizes)
    ranks = run_ranks(count_bytes_of_a_load, 4, directory, layout)
    for held, requested, _, _ in ranks:
        assert held > 10e6
        assert 0.9 * held < requested <= 1.02 * held
    if kind == "experts":  # a rank's experts lie side by side, so it needs far fewer calls than there are tensors
        assert max(calls for *_, calls in ranks) < len(hf_state(directory)) / 4
    stored = sum(stored for _, _, stored, _ in ranks)
    if stored == 0:
        pytest.skip("this file system does not account for what it reads")
    shared = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert 0.9 < stored / shared <= 1.02  # replicas share the page cache as well


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_a_rank_alone_on_its_machine_reads_its_own_pages_only(rank: int, tmp_path: Path) -> None:
    """Without reading ahead, storage is read only for the pages that hold the tensors of the rank."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen3", **WIDE)
    spec = AutoBridge.from_pretrained(directory).spec
    side = megatron_side(spec, LAYOUT, rank)
    plan = compile_plan(spec, hf_side(spec), side)
    targets = {name: torch.zeros(shape) for name, shape in side.shapes.items()}
    checkpoint, requested_pages = Checkpoint(directory), set()
    forget(directory)
    before = read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rectangles.os, "preadv", watched(os.preadv, requested_pages))
        checkpoint.load(plan, targets, read_ahead=False)
    stored, held = read_bytes() - before, sum(target.nbytes for target in targets.values())
    if stored == 0:
        pytest.skip("this file system does not account for what it reads")
    assert stored <= 1.02 * len(requested_pages) * PAGE
    assert stored <= 1.3 * held  # pages at both ends of 16 KiB runs
    full_state = hf_state(directory)
    assert all(
        torch.equal(
            copy.target.of(targets[copy.target.name], copy.shape), copy.source.of(full_state[copy.source.name], copy.shape)
        )
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
    """A handful of small sums: flags that tell whether a rank has failed, the number of a save's attempt, and once in a save 8
    bytes of digest for each tensor."""
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    digests = 8 * len(hf_state(directory))
    for saved, loaded in run_ranks(collectives_of_save_and_load, 4, directory):
        assert 1 <= len(loaded) <= 8
        assert set(loaded) == {("all_reduce", 8)}
        assert len(saved) <= 10
        assert set(saved) == {("all_reduce", 8), ("all_reduce", 16), ("all_reduce", digests)}
        assert saved.count(("all_reduce", digests)) == 1


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


def reshape(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"shape":[515,64]', b'"shape":[516,64]'))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda file: os.truncate(file, file.stat().st_size // 2), "is truncated or corrupt"),
    "one byte short": (lambda file: os.truncate(file, file.stat().st_size - 1), "is truncated or corrupt"),
    "cut in the header": (lambda file: os.truncate(file, 100), "is truncated or corrupt"),
    "empty": (lambda file: os.truncate(file, 0), "is truncated or corrupt"),
    "header length": (lambda file: flip(file, 0, b"\xff" * 8), "is truncated or corrupt"),
    "header": (lambda file: flip(file, 8, b"garbage"), "is truncated or corrupt"),
    "another shape": (lambda file: reshape(file), "is truncated or corrupt .*its shape"),
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
    wrong = {
        "": "no JSON",
        '{"weight_map": ': "no JSON",
        "[]": "must hold an object with fields, found a list",
        "{}": "weight_map: is missing",
        '{"weight_map": {}}': "weight_map is empty",
        '{"weight_map": ["model.safetensors"]}': "weight_map: a section is needed, found a list",
        '{"weight_map": {"x": 3}}': r"weight_map\.x: text is needed, found 3",
        '{"weight_map": {"x": "a", "x": "b"}}': "'x' stands twice in one object",
        '{"weight_map": {"x": "../model.safetensors"}}': r"names the file '\.\./model\.safetensors'; only files of",
        '{"weight_map": {"x": "/etc/passwd"}}': "names the file '/etc/passwd'; only files of",
        '{"weight_map": {"x": "a/../../b"}}': "only files of the checkpoint's directory",
        '{"weight_map": ' + "[" * 100_000: "nested more than 32 levels deep",
    }
    for text, message in wrong.items():
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message) as caught:
            Checkpoint(directory)
        assert str(index) in str(caught.value)


def test_a_file_that_would_wait_for_its_writer_is_refused(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is no regular file"):
            Checkpoint(directory)


def test_tensors_of_every_kind_are_what_safetensors_reads(tmp_path: Path) -> None:
    """Odd offsets, scalars, nothing at all; and what is done to a tensor does not reach the file."""
    state = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "after": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "small": torch.randn(8).to(torch.float8_e4m3fn),
    }
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert {name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()
    }
    for name, tensor in state.items():
        assert torch.equal(checkpoint[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
        assert checkpoint[name].dtype == tensor.dtype
    assert checkpoint["scalar"].item() == 2.5
    checkpoint["after"].zero_()
    assert torch.equal(Checkpoint(tmp_path)["after"], state["after"])


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    save_file({"a": torch.ones(4)}, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "model.safetensors")
    target = torch.empty(4)
    checkpoint.read_into(View("a", 0, (1,)), (4,), target)
    assert torch.equal(target, torch.zeros(4))


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


def test_two_sets_of_files_are_refused_where_programs_read_others(tmp_path: Path) -> None:
    """Transformers reads the single file, vLLM those of the index; an index of the single file is one set."""
    directory, model = tiny_checkpoint(tmp_path / "one", "llama", seed=1)
    tiny_checkpoint(tmp_path / "other", "llama", seed=2)[1].save_pretrained(tmp_path / "other", max_shard_size="200KB")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(hf_state(directory), "model.safetensors")}))
    assert_same_state(dict(Checkpoint(directory)), hf_state(directory))
    for path in (tmp_path / "other").glob("*.safetensors*"):
        if path.name != "model.safetensors":
            shutil.copy(path, directory)
    with pytest.raises(CheckpointError, match=r"holds model.safetensors and also .*, which names model-00001.* Remove"):
        Checkpoint(directory)
    (directory / "model.safetensors").unlink()
    assert Checkpoint(directory).entries.keys() == model.state_dict().keys()


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"b lie in y\.safetensors and in x\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(name: str, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "llama")
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(CheckpointError, match=rf"holds {name}, .*from_pretrained\('.*'\)\.save_pretrained"):
        AutoBridge.from_pretrained(directory).verify(directory, hf_state(directory))
