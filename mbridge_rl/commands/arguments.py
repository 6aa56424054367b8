"""Code that the commands share: parsing of models, layouts and sizes, and errors that end a command."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbridge_rl.terminal import Terminal

if TYPE_CHECKING:
    import torch

    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.core.layout import ParallelLayout
    from mbridge_rl.hf.source import Opened

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_NUMBERS = re.compile(r"(\d+)(?:x(\d+))?")
_FIELDS_OF_STAGES = re.compile(r"\b(stage_layers|pipeline_layout)\b")  # fields that the option `stages` sets
_NEXT_PAIR = re.compile(r",(?=[a-z_]+=)")


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
    """Ends the command with one line and exit code 1 if the library raises one of its errors. Messages about a layout name the
    options of the command instead of the fields."""
    from mbridge_rl.core.errors import BridgeError, LayoutError

    try:
        yield
    except (BridgeError, ImportError) as error:
        message = _FIELDS_OF_STAGES.sub("stages", str(error)) if isinstance(error, LayoutError) else str(error)
        Terminal(stderr=True).line(f"{type(error).__name__}: {message}")
        raise typer.Exit(1) from error


def model_config(model: str) -> Any:
    """The Transformers config of a directory, a bundled name, or a repository on the hub.

    Raises:
        CheckpointError: `model` is none of these.
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


def opened_checkpoint(directory: Path, bridge: AutoBridge) -> Opened:
    """The tensors of a Hugging Face checkpoint, dequantized if they are quantized; names, shapes and dtypes are checked.

    Raises:
        CheckpointError, StateMismatchError: the checkpoint cannot be read, or does not fit its config.
    """
    from mbridge_rl.hf.source import open_checkpoint

    return open_checkpoint(bridge.spec, bridge.hf_config, directory)


def _layout_options(
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallel size.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline parallel size.")] = None,
    vpp: Annotated[int | None, typer.Option(min=1, help="Virtual pipeline stages on each pipeline rank.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Expert parallel size.")] = None,
    etp: Annotated[
        int | None, typer.Option(min=1, help="Expert tensor parallel size; tp if not given, as in Megatron.")
    ] = None,
    cp: Annotated[int | None, typer.Option(min=1, help="Context parallel size.")] = None,
    dp: Annotated[
        int | None, typer.Option(min=1, help="Data parallel size; the least that the other axes need if not given.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Layers of each stage: 4x13+3x3, 3+4+4, or Megatron's 'Et*3|(tt|)*29,m|L'; as even as can be if not given."
        ),
    ] = None,
    first_stage_layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the first pipeline rank; the others share the rest.")
    ] = None,
    last_stage_layers: Annotated[int | None, typer.Option(min=1, help="Layers of the last pipeline rank.")] = None,
    embedding_as_layer: Annotated[
        bool | None, typer.Option("--embedding-as-layer", help="The embedding counts as a layer when layers are dealt.")
    ] = None,
    loss_as_layer: Annotated[
        bool | None, typer.Option("--loss-as-layer", help="The output layer counts as a layer when layers are dealt.")
    ] = None,
) -> None:
    """The options that describe a layout."""


def takes_layout(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a layout in the place of its parameter `layout_options`, which receives them by name."""
    options = inspect.signature(_layout_options, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(layout_options={name: given.pop(name) for name in options}, **given)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, own_parameter in own.items()
        for parameter in (options.values() if name == "layout_options" else [own_parameter])
    ]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def layout_of(layout_options: Mapping[str, Any], num_layers: int) -> ParallelLayout | None:
    """The layout that the options of a command describe, `None` if no option is given. A `dp` that is not given is the smallest
    that the expert axes need."""
    given = {name: value for name, value in layout_options.items() if value is not None and name != "stages"}
    if layout_options["stages"] is not None:
        given |= stages(layout_options["stages"])
    if not given:
        return None
    dense, expert = given.get("tp", 1) * given.get("cp", 1), given.get("ep", 1) * given.get("etp", given.get("tp", 1))
    given.setdefault("dp", math.lcm(dense, expert) // dense)
    return with_stages(given, num_layers)


def pairs(text: str, known: tuple[str, ...]) -> dict[str, str]:
    """Parses `tp=8,pp=16` into a mapping; a value may contain commas. Raises BadParameter for text of another form, or with
    names that are not in `known`."""
    values: dict[str, str] = {}
    for item in filter(None, _NEXT_PAIR.split(text)):
        name, equals, value = item.partition("=")
        if not equals or name not in known or name in values:
            raise typer.BadParameter(f"{item!r}: write each of {', '.join(known)} at most once, as in tp=8,pp=2")
        values[name] = value
    return values


def whole_number(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{name}={text}: a whole number of at least 1 is needed")
    return int(text)


def stages(text: str) -> dict[str, Any]:
    """The arguments of `ParallelLayout` for a split: `4x13+3x3` is thirteen stages of four layers, then three of three; a text
    that begins with an E is a layout string of Megatron."""
    if text.startswith("E"):
        return {"pipeline_layout": text}
    counts: list[int] = []
    for item in text.split("+"):
        match = _NUMBERS.fullmatch(item)
        if match is None:
            raise typer.BadParameter(
                f"stages={text}: write layers x stages, as in 4x13+3x3, one number per stage, as in 3+4+4, or what Megatron "
                "takes, as in Et*3|(tt|)*29,m|L"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return {"stage_layers": tuple(counts)}


_STAGE_ARGUMENTS = (
    "stage_layers",
    "pipeline_layout",
    "first_stage_layers",
    "last_stage_layers",
    "embedding_as_layer",
    "loss_as_layer",
)


def with_stages(layout: Mapping[str, Any], num_layers: int) -> ParallelLayout:
    """The layout; layers that do not divide are split as evenly as possible, with one more layer in the first stages."""
    from mbridge_rl.core.layout import ParallelLayout

    count = layout.get("pp", 1) * layout.get("vpp", 1)
    if num_layers % count and not any(layout.get(name) for name in _STAGE_ARGUMENTS):
        per_stage, remainder = divmod(num_layers, count)
        layout = {**layout, "stage_layers": (per_stage + 1,) * remainder + (per_stage,) * (count - remainder)}
    return ParallelLayout(**layout)


def size_in_bytes(text: str) -> int:
    """Parses a size: `256MiB`, `64MB`, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text, flags=re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is no size; write 256MiB, 64MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def readable(nbytes: float) -> str:
    """A number of bytes as text in decimal units, like bandwidths."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B"
