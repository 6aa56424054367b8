"""`mbridge-rl verify`: imports a checkpoint on real Megatron ranks, exports it, compares both bit by bit, and compares logits
with Transformers'."""

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
from mbridge_rl.commands.verify_lengths import SHORT, Lengths, compared_positions, lengths_for, longest
from mbridge_rl.terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from mbridge_rl.bridge import AutoBridge
    from mbridge_rl.core.layout import ParallelLayout

_SHOWN_NAMES = 20
_ROWS = 2


@takes_layout
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint directory.")],
    *,
    layout_options: dict[str, Any],
    sequence_parallel: Annotated[
        bool | None, typer.Option("--sp/--no-sp", help="Sequence parallelism; where Megatron demands it if not given.")
    ] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits with Transformers', which loads the model once more.")] = True,
    tolerance: Annotated[
        float, typer.Option(help="Of logits, absolute or relative to the largest where that is above 1.")
    ] = 1e-3,
    max_positions: Annotated[
        int,
        typer.Option(
            min=2,
            help="The longest sequence whose logits are compared: past every window and rotary switch of the config up to "
            "here, as far as a quarter of this machine's free memory holds it.",
        ),
    ] = 8256,
    timeout: Annotated[float, typer.Option(help="Seconds for everything that the ranks do.")] = 3600.0,
) -> None:
    """Import a checkpoint on real Megatron ranks of this machine, export it, and compare: every tensor bit by bit, then logits.

    The model is built in fp32, which holds bf16 and fp16 weights exactly. Logits are compared with those of Transformers' eager
    attention, of sequences that are longer than the config's windows and the lengths at which its positions change. Exit code 0
    means equal, 1 that something differs.
    """
    with readable_errors():
        from mbridge_rl.bridge import AutoBridge
        from mbridge_rl.core.layout import ParallelLayout
        from mbridge_rl.training.run.launcher import launch

        bridge = AutoBridge.from_pretrained(checkpoint)
        layout = layout_of(layout_options, bridge.spec.num_layers) or ParallelLayout()
        bridge.spec.validate(layout)
        opened_checkpoint(checkpoint, bridge)  # so that an error is reported once and not by every rank
        options = {"sequence_parallel": sequence_parallel}
        lengths = lengths_for(bridge.hf_config, min(max_positions, longest(bridge.hf_config, _free_memory())))
        compared_lengths = lengths.lengths if logits else ()
        result = launch(_on_rank, layout.world_size, checkpoint, layout, options, compared_lengths, timeout=timeout)
        if result is None:  # under torchrun on other ranks than the first
            return
        different, logits_by_length = result
        rows = [_compared_tensors(len(bridge.spec.hf_shapes), different)]
        if logits:
            rows.append(_compared_logits(checkpoint, bridge, lengths, logits_by_length, tolerance))
            rows += [_left_out(lengths)] if lengths.left_out else []
    _print(checkpoint, layout, rows, different)
    if any(row["equal"] is False for row in rows):
        raise typer.Exit(1)


def _on_rank(
    checkpoint: Path, layout: ParallelLayout, options: dict[str, Any], lengths: tuple[int, ...]
) -> tuple[list[str], dict[int, Tensor]] | None:
    """Runs on every rank. Returns on rank 0 the names of the tensors that differ after import and export, and for each length
    the logits `[rows, compared positions, vocab]`."""
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
    last = next(other for other in range(layout.world_size) if layout.coordinates(other).pp == layout.pp - 1)
    logits_by_length = {}
    for length in lengths:
        positions = compared_positions(length)
        logits = forward_logits(model, _tokens(bridge, length).to(_device()))
        shape = (_rows(length), len(positions), bridge.spec.vocab_size)
        logits_by_length[length] = _on_first_rank(None if logits is None else logits[:, positions], last, shape)
    return (different, logits_by_length) if rank == 0 else None


def _same_bits(exported: Tensor, expected: Tensor) -> bool:
    """Whether `exported` is `expected` cast to fp32, which is exact, bit by bit: nan equals the same nan, and 0 differs from
    -0."""
    import torch

    return exported.shape == expected.shape and torch.equal(exported.view(torch.int32), expected.float().view(torch.int32))


def _rows(length: int) -> int:
    return _ROWS if length <= SHORT else 1


def _tokens(bridge: AutoBridge, length: int) -> Tensor:
    """Random tokens without placeholders for pixels."""
    import torch

    from mbridge_rl.core.extras import TextOnly

    shape = (_rows(length), length)
    tokens = torch.randint(0, bridge.spec.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    placeholders = {token for extra in bridge.spec.extras if isinstance(extra, TextOnly) for token in extra.placeholders}
    text = next(token for token in range(len(placeholders) + 1) if token not in placeholders)
    return tokens.masked_fill(torch.isin(tokens, torch.tensor(sorted(placeholders), dtype=tokens.dtype)), text)


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_first_rank(logits: Tensor | None, holder: int, shape: tuple[int, ...]) -> Tensor:
    """Broadcasts logits from a rank of the last pipeline stage to all ranks."""
    import torch
    import torch.distributed as dist

    received = torch.empty(shape, device=_device()) if logits is None else logits.contiguous()
    dist.broadcast(received, src=holder)
    return received.cpu()


def _compared_tensors(count: int, different: list[str]) -> dict[str, Any]:
    result = f"{count:,} tensors" if not different else f"{len(different):,} of {count:,} tensors differ"
    return {"check": "import, export", "equal": not different, "result": result}


def _compared_logits(
    checkpoint: Path, bridge: AutoBridge, lengths: Lengths, logits_by_length: dict[int, Tensor], tolerance: float
) -> dict[str, Any]:
    import torch
    import transformers

    from mbridge_rl.hf.quantization import quantization_of

    architecture = bridge.spec.architecture
    model_class = getattr(transformers, architecture, None)
    if quantization_of(bridge.hf_config) or model_class is None:
        reason = f"Transformers has no {architecture}"
        if model_class is not None:
            reason = "the checkpoint is quantized, which Transformers does not run everywhere"
        return {"check": "logits", "equal": None, "result": f"not compared: {reason}"}
    transformers.utils.logging.disable_progress_bar()
    # Transformers' other attentions ignore some of their arguments, such as Gemma 2's cap of scores.
    reference = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": False}
    model = model_class.from_pretrained(checkpoint, config=bridge.hf_config, **reference).eval()
    largest, difference, same = 0.0, torch.zeros(()), []
    for length, logits in logits_by_length.items():
        with torch.no_grad():
            expected = model(_tokens(bridge, length), use_cache=False).logits[:, compared_positions(length)]
        largest = max(largest, expected.abs().max().item())
        difference = torch.maximum(difference, (logits - expected).abs().max())  # the maximum of a nan is nan
        same.append((logits.argmax(-1) == expected.argmax(-1)).flatten())
    chosen = torch.cat(same).float().mean().item()
    result = f"at most {difference:.2g} apart of up to {largest:.3g}, the same best token at {chosen:.1%} of positions; "
    result += f"sequences of {' and '.join(f'{length:,}' for length in logits_by_length)} tokens"
    result += f", past {', '.join(map(str, lengths.covered))}" if lengths.covered else ""
    is_equal = difference.item() <= tolerance * max(1.0, largest)  # false for nan, too
    return {"check": "logits", "equal": is_equal, "result": result}


def _left_out(lengths: Lengths) -> dict[str, Any]:
    switches = ", ".join(map(str, lengths.left_out))
    result = f"what begins after more tokens: {switches} (--max-positions and free memory bound the sequences)"
    return {"check": "not compared", "equal": None, "result": result}


def _print(checkpoint: Path, layout: ParallelLayout, rows: list[dict[str, Any]], different: list[str]) -> None:
    terminal = Terminal()
    terminal.line((str(checkpoint), "bold"), f" on {layout.world_size} Megatron ranks, {layout}")
    for row in rows:
        verdict = {True: ("equal    ", "green"), False: ("different", "red"), None: "-        "}[row["equal"]]
        terminal.line(f"{row['check']:<16}", verdict, f"  {row['result']}")
    for hf_name in different[:_SHOWN_NAMES]:
        terminal.line(f"  {hf_name}")
    if len(different) > _SHOWN_NAMES:
        terminal.line(f"  ... and {len(different) - _SHOWN_NAMES} more")
