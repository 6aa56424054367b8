"""What the commands have in common: how models, layouts and sizes are written, and how errors end a command."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.hf.checkpoint import Checkpoint
    from mbridge_rl.hf.dequantize import Dequantized

TpSize = Annotated[int | None, typer.Option(min=1, help="Tensor parallel size.")]
PpSize = Annotated[int | None, typer.Option(min=1, help="Pipeline parallel size.")]
VppSize = Annotated[int | None, typer.Option(min=1, help="Virtual pipeline stages on each pipeline rank.")]
EpSize = Annotated[int | None, typer.Option(min=1, help="Expert parallel size.")]
EtpSize = Annotated[int | None, typer.Option(min=1, help="Expert tensor parallel size; tp if not given, as in Megatron.")]
CpSize = Annotated[int | None, typer.Option(min=1, help="Context parallel size.")]
DpSize = Annotated[int | None, typer.Option(min=1, help="Data parallel size; the least that the other axes need if not given.")]
Stages = Annotated[str | None, typer.Option(help="Layers of each stage: 4x13+3x3, or 3+4+4; as even as can be if not given.")]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_STAGES = re.compile(r"(\d+)(?:x(\d+))?")


class Dtype(StrEnum):
    """Dtypes of weights."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


def torch_dtype(dtype: Dtype) -> torch.dtype:
    import torch

    return {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}[dtype]


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Ends the command with one line and exit code 1 where the library says what is wrong."""
    from mbridge_rl.core.errors import BridgeError

    try:
        yield
    except (BridgeError, ImportError) as error:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from error


def model_config(model: str) -> Any:
    """The Transformers config of a directory, a bundled name, or a repository on the hub.

    Raises:
        CheckpointError: it is none of them.
    """
    from mbridge_rl.core.errors import CheckpointError
    from mbridge_rl.hf.bundled import bundled_config, bundled_names
    from mbridge_rl.hf.config import load_config, local_directory

    path = Path(model)
    if path.name == "config.json" and path.is_file():
        return load_config(path.parent)
    if not path.is_dir() and model in bundled_names():
        return bundled_config(model)
    try:
        return load_config(local_directory(model))
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nBundled names are {', '.join(bundled_names())}") from error


def opened_checkpoint(directory: Path, bridge: AutoBridge) -> Checkpoint | Dequantized:
    """The tensors of a Hugging Face checkpoint, dequantized where they are quantized; names, shapes and dtypes are checked.

    Raises:
        CheckpointError, StateMismatchError: it cannot be read, or is not the checkpoint of the config beside it.
    """
    import torch

    from mbridge_rl.hf.checkpoint import Checkpoint
    from mbridge_rl.hf.dequantize import Dequantized
    from mbridge_rl.hf.state import check_hf_state

    hf_state: Checkpoint | Dequantized = Checkpoint(directory)
    if quantization := getattr(bridge.hf_config, "quantization_config", None):
        hf_state = Dequantized(hf_state, quantization, bridge.hf_config.dtype or torch.bfloat16)
    check_hf_state(bridge.spec, hf_state.tensors, str(directory))
    return hf_state


def layout_of(asked: Mapping[str, Any], num_layers: int) -> ParallelLayout | None:
    """The layout that the options of a command ask for, `None` where they ask for none. A `dp` that is left open is the least
    that the expert axes need."""
    given = {name: size for name, size in asked.items() if size is not None and name != "stages"}
    if asked["stages"] is not None:
        given["stage_layers"] = stage_layers(asked["stages"])
    if not given:
        return None
    dense, expert = given.get("tp", 1) * given.get("cp", 1), given.get("ep", 1) * given.get("etp", given.get("tp", 1))
    given.setdefault("dp", math.lcm(dense, expert) // dense)
    return with_stages(given, num_layers)


def pairs(text: str, known: tuple[str, ...]) -> dict[str, str]:
    """`tp=8,pp=16` as a mapping; BadParameter for what is not of this form or not among `known`."""
    found: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals or name not in known or name in found:
            raise typer.BadParameter(f"{item!r}: write each of {', '.join(known)} at most once, as in tp=8,pp=2")
        found[name] = value
    return found


def whole_number(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{name}={text}: a whole number of at least 1 is needed")
    return int(text)


def stage_layers(text: str) -> tuple[int, ...]:
    """`4x13+3x3`: thirteen stages of four layers, then three of three."""
    counts: list[int] = []
    for item in text.split("+"):
        match = _STAGES.fullmatch(item)
        if match is None:
            raise typer.BadParameter(
                f"stages={text}: write layers x stages, as in 4x13+3x3, or one number per stage, as in 3+4+4"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def with_stages(layout: Mapping[str, Any], num_layers: int) -> ParallelLayout:
    """The layout; layers that don't divide are split as evenly as can be, the first stages taking one more."""
    from mbridge_rl.core.layout import ParallelLayout

    stages = layout.get("pp", 1) * layout.get("vpp", 1)
    if layout.get("stage_layers") is None and num_layers % stages:
        each, more = divmod(num_layers, stages)
        layout = {**layout, "stage_layers": (each + 1,) * more + (each,) * (stages - more)}
    return ParallelLayout(**layout)


def size_in_bytes(text: str) -> int:
    """`256MiB`, `64MB`, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text, flags=re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no size; write 256MiB, 64MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def readable(nbytes: float) -> str:
    """In decimal units, as bandwidths are."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B"
