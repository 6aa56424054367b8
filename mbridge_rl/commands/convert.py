"""`mbridge-rl convert`: converts Hugging Face checkpoints to files of Megatron ranks, back, and from one layout to another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbridge_rl.commands.arguments import (
    Dtype,
    layout_of,
    opened_checkpoint,
    readable,
    readable_errors,
    size_in_bytes,
    takes_layout,
    torch_dtype,
)

if TYPE_CHECKING:
    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.distributed.rank_files import Weights


class OutputKind(StrEnum):
    """The format that a conversion writes."""

    HF = "hf"
    MEGATRON = "megatron"


@takes_layout
def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint, or a directory that this command wrote.")],
    target: Annotated[Path, typer.Argument(help="A directory that is not there yet.")],
    *,
    to: Annotated[OutputKind | None, typer.Option(help="What to write; megatron if a layout is given, else hf.")] = None,
    layout_options: dict[str, Any],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the written tensors; as they are if not given.")] = None,
    shard: Annotated[str, typer.Option(help="Size of a file of a Hugging Face checkpoint.")] = "5GiB",
) -> None:
    """Hugging Face to one safetensors file for each Megatron rank, back, or from one Megatron layout to another.

    Files of Megatron ranks hold tensors under Megatron's names, with layer and expert numbers of the whole model. Nothing is
    gathered: no more than one rank's target tensors, and the source tensors from which they are made, are in memory.
    """
    with readable_errors():
        from mbridge_rl.bridge import AutoBridge
        from mbridge_rl.core.layout import ParallelLayout
        from mbridge_rl.distributed.rank_files import write_checkpoint, write_rank_files
        from mbridge_rl.hf.config import copy_companions, save_config

        bridge = AutoBridge.from_pretrained(source)
        weights, description = _opened(source, bridge, dtype)
        layout = layout_of(layout_options, bridge.spec.num_layers)
        if to is OutputKind.HF and layout is not None:
            raise typer.BadParameter("a Hugging Face checkpoint has no layout: leave out --to hf or the layout")

        def write_companions(directory: Path) -> None:
            save_config(bridge.hf_config, directory, next(iter(weights.dtypes.values())))
            copy_companions(source, directory)

        if layout is None and to is not OutputKind.MEGATRON:
            typer.echo(f"{description} -> a Hugging Face checkpoint in {target}")
            files = write_checkpoint(bridge.spec, weights, target, write_companions, size_in_bytes(shard))
        else:
            layout = layout or ParallelLayout()
            typer.echo(f"{description} -> {layout.world_size} Megatron ranks, {layout}, in {target}")
            files = write_rank_files(bridge.spec, weights, target, layout, write_companions)
        for file in files:
            typer.echo(f"{file.name}: {file.tensors:,} tensors, {readable(file.nbytes)}")


def _opened(source: Path, bridge: AutoBridge, dtype: Dtype | None) -> tuple[Weights, str]:
    """The checked weights of the source, and a description of it."""
    from dataclasses import replace

    from mbridge_rl.distributed.rank_files import is_rank_files, of_hf_state, open_rank_files

    if is_rank_files(source):
        weights, layout = open_rank_files(source, bridge.spec)
        description = f"{layout.world_size} Megatron ranks, {layout}, in {source}"
    else:
        hf_state = opened_checkpoint(source, bridge)
        dtypes = {hf_name: tensor.dtype for hf_name, tensor in hf_state.tensors.items()}
        weights, description = of_hf_state(bridge.spec, hf_state, dtypes), f"the Hugging Face checkpoint {source}"
    if dtype is not None:
        weights = replace(weights, dtypes=bridge.spec.hf_dtypes(torch_dtype(dtype)))
    return weights, description
