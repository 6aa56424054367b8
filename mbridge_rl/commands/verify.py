"""`mbridge-rl verify`: a checkpoint through real Megatron ranks and back, compared bit by bit, and logits with Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbridge_rl.commands.arguments import (
    layout_of,
    opened_checkpoint,
    readable_errors,
    takes_layout,
)
from mbridge_rl.terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.core.layout import ParallelLayout

_SHOWN_NAMES = 20
_TOKENS = (2, 64)  # rows and positions that are compared


@takes_layout
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint directory.")],
    *,
    asked: dict[str, Any],
    sequence_parallel: Annotated[
        bool | None, typer.Option("--sp/--no-sp", help="Sequence parallelism; where Megatron demands it if not given.")
    ] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits with Transformers', which loads the model once more.")] = True,
    tolerance: Annotated[
        float, typer.Option(help="Of logits, absolute or relative to the largest where that is above 1.")
    ] = 1e-3,
    timeout: Annotated[float, typer.Option(help="Seconds for everything that the ranks do.")] = 3600.0,
) -> None:
    """Import a checkpoint on real Megatron ranks of this machine, export it, and compare: every tensor bit by bit, then logits.

    The model is built in fp32, which holds bf16 and fp16 weights exactly. Exit code 0 means equal, 1 that something differs.
    """
    with readable_errors():
        from mbridge_rl.bridge import AutoBridge
        from mbridge_rl.core.layout import ParallelLayout
        from mbridge_rl.training.launcher import launch

        bridge = AutoBridge.from_pretrained(checkpoint)
        layout = layout_of(asked, bridge.spec.num_layers) or ParallelLayout()
        bridge.spec.validate(layout)
        opened_checkpoint(checkpoint, bridge)  # what is wrong with it is said once, not by every rank
        options = {"sequence_parallel": sequence_parallel}
        found = launch(_on_rank, layout.world_size, checkpoint, layout, options, logits, timeout=timeout)
        if found is None:  # under torchrun, a rank that has nothing to report
            return
        different, found_logits = found
        rows = [_compared_tensors(len(bridge.spec.hf_shapes), different)]
        if found_logits is not None:
            rows.append(_compared_logits(checkpoint, bridge, found_logits, tolerance))
    _print(checkpoint, layout, rows, different)
    if any(row["equal"] is False for row in rows):
        raise typer.Exit(1)


def _on_rank(
    checkpoint: Path, layout: ParallelLayout, options: dict[str, Any], logits: bool
) -> tuple[list[str], Tensor | None] | None:
    """On rank 0: names of the tensors that came back otherwise, and `[batch, seq, vocab]` logits."""
    import torch
    import torch.distributed as dist

    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.megatron.forward import forward_logits
    from mbridge_rl.megatron.parallel import initialize_parallel

    initialize_parallel(layout)
    rank = dist.get_rank()
    bridge = AutoBridge.from_pretrained(checkpoint)
    model = bridge.build_model(layout, dtype=torch.float32, **options)
    bridge.load_weights(model)
    expected = opened_checkpoint(checkpoint, bridge) if rank == 0 else {}
    same = {
        hf_name: _same_bits(tensor.cpu(), expected[hf_name])
        for hf_name, tensor in bridge.export_weights(model, dtype=torch.float32, ranks=[0])
    }
    different = [hf_name for hf_name in bridge.spec.hf_shapes if not same.get(hf_name, False)]
    found = forward_logits(model, _tokens(bridge)) if logits else None
    last = next(other for other in range(layout.world_size) if layout.coordinates(other).pp == layout.pp - 1)
    if logits:
        found = _on_first_rank(found, last, (*_TOKENS, bridge.spec.vocab_size))
    return (different, found) if rank == 0 else None


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether `expected` cast to fp32, which is exact, is `found`; nan equals the same nan, and zero no negative zero."""
    import torch

    return found.shape == expected.shape and torch.equal(found.view(torch.int32), expected.float().view(torch.int32))


def _tokens(bridge: AutoBridge) -> Tensor:
    import torch

    return torch.randint(0, bridge.spec.vocab_size, _TOKENS, generator=torch.Generator().manual_seed(0)).to(_device())


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_first_rank(logits: Tensor | None, holder: int, shape: tuple[int, ...]) -> Tensor:
    """Logits from a rank of the last pipeline stage to all."""
    import torch
    import torch.distributed as dist

    received = torch.empty(shape, device=_device()) if logits is None else logits.contiguous()
    dist.broadcast(received, src=holder)
    return received.cpu()


def _compared_tensors(count: int, different: list[str]) -> dict[str, Any]:
    said = f"{count:,} tensors" if not different else f"{len(different):,} of {count:,} tensors differ"
    return {"what": "import, export", "equal": not different, "said": said}


def _compared_logits(checkpoint: Path, bridge: AutoBridge, found: Tensor, tolerance: float) -> dict[str, Any]:
    import torch
    import transformers

    from mbridge_rl.hf.quantization import quantization_of

    if quantization_of(bridge.hf_config):
        said = "not compared: the checkpoint is quantized, which Transformers does not run everywhere"
        return {"what": "logits", "equal": None, "said": said}
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, config=bridge.hf_config, dtype=torch.float32, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        expected = model(_tokens(bridge).cpu()).logits
    largest, difference = expected.abs().max().item(), (found - expected).abs().max().item()
    same_choice = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return {
        "what": "logits",
        "equal": difference <= tolerance * max(1.0, largest),  # false for nan, too
        "said": f"at most {difference:.2g} apart of up to {largest:.3g}, the same best token at {same_choice:.1%} of positions",
    }


def _print(checkpoint: Path, layout: ParallelLayout, rows: list[dict[str, Any]], different: list[str]) -> None:
    terminal = Terminal()
    terminal.line((str(checkpoint), "bold"), f" on {layout.world_size} Megatron ranks, {layout}")
    for row in rows:
        verdict = {True: ("equal    ", "green"), False: ("different", "red"), None: "-        "}[row["equal"]]
        terminal.line(f"{row['what']:<16}", verdict, f"  {row['said']}")
    for hf_name in different[:_SHOWN_NAMES]:
        terminal.line(f"  {hf_name}")
    if len(different) > _SHOWN_NAMES:
        terminal.line(f"  ... and {len(different) - _SHOWN_NAMES} more")
