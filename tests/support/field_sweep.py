"""One field of a family's config at a time set to another value: Transformers' logits and ours, in one process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from families.family import VOCABULARY, Family
from field_values import Change
from tiny import hf_state
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import BridgeError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel

# Longer than every window and every original length that `field_values` sets; tokens that stand for no pixels.
TOKENS = torch.randint(0, VOCABULARY - 15, (2, 24), generator=torch.Generator().manual_seed(0))

Answer = Literal["equal", "refused", "no legal value", "different", "refused without its name", "error"]
FAULTS: tuple[Answer, ...] = ("different", "refused without its name", "error")


@dataclass(frozen=True)
class Outcome:
    """What came of one change.

    Attributes:
        detail: the error, or how far apart the logits are.
        effect: largest difference that the change makes to Transformers' logits; infinite where their shape changes.
    """

    change: Change
    answer: Answer
    detail: str = ""
    effect: float = 0.0


@dataclass(frozen=True)
class Unchanged:
    """The family's own model: the logits of Transformers and of Megatron, and what describes it here."""

    expected: Tensor
    logits: Tensor
    description: str


def sweep(rank: int, family: Family, changes: Iterable[Change], combined: Change | None = None) -> list[Outcome]:
    """Returns the outcome of every change. `run_ranks` runs this on one rank.

    Args:
        together: fields that are expected to have no effect; set at once, and in ever smaller parts where that is not so.
    """
    initialize_parallel(ParallelLayout())
    with tempfile.TemporaryDirectory() as folder:
        expected = _reference(family, Path(folder))
        bridge = AutoBridge.from_pretrained(folder)
        unchanged = Unchanged(expected, _megatron_logits(bridge), _description(bridge.spec))
    outcomes = [_outcome(family, change, unchanged) for change in changes]
    return outcomes + (_in_parts(family, combined, unchanged) if combined else [])


def _description(spec: ModelSpec) -> str:
    """Of all that decides what Megatron computes; towers, which text does not reach, are left out."""
    return repr(replace(spec, carried={}, alternatives=(), prediction=None))


def _in_parts(family: Family, change: Change, unchanged: Unchanged) -> list[Outcome]:
    """One outcome for each of the fields of `change`."""
    outcome = _outcome(family, change, unchanged)
    alone = [Change(f"{change.inside}.{name}" if change.inside else name, {name: change.values[name]}, change.inside)
             for name in change.values]  # fmt: skip
    if outcome.answer == "equal" or len(alone) == 1:
        return [replace(outcome, change=part) for part in alone]
    names = list(change.values)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    parts = (Change(change.field, {name: change.values[name] for name in half}, change.inside) for half in halves)
    return [outcome for part in parts for outcome in _in_parts(family, part, unchanged)]


def tolerance(logits: Tensor, layers: int) -> float:
    """Of fp32 logits that two libraries compute by sums in another order: each of about eight products in a layer, and the
    output layer's, may err by a few units in the last place of values as large as the logits are."""
    ulps = 4 * 8 * (layers + 1)
    return ulps * torch.finfo(torch.float32).eps * max(1.0, logits.abs().max().item())


def _outcome(family: Family, change: Change, unchanged: Unchanged) -> Outcome:
    directory = Path(tempfile.mkdtemp())
    try:
        try:
            expected = _reference(change.applied(family), directory)
        except Exception as error:  # whatever Transformers says, the value is none that it can run
            return Outcome(change, "no legal value", f"{type(error).__name__}: {str(error)[:200]}")
        if not expected.isfinite().all():
            return Outcome(change, "no legal value", "Transformers' logits are not finite")
        same_shape = expected.shape == unchanged.expected.shape
        effect = (expected - unchanged.expected).abs().max().item() if same_shape else float("inf")
        return _compared(family, change, directory, expected, effect, unchanged)
    finally:
        shutil.rmtree(directory)


def _reference(family: Family, directory: Path) -> Tensor:
    """Saves the family's model to `directory`; its logits."""
    model = family.checkpoint(directory)
    with torch.no_grad():
        return model(TOKENS, use_cache=False, return_dict=True).logits.float()


def _compared(
    family: Family, change: Change, directory: Path, expected: Tensor, effect: float, unchanged: Unchanged
) -> Outcome:
    try:
        bridge = AutoBridge.from_pretrained(directory)
    except BridgeError as error:
        named = any(name in str(error) for name in change.names)
        return Outcome(change, "refused" if named else "refused without its name", str(error), effect)
    except Exception as error:
        return Outcome(change, "error", f"{type(error).__name__}: {error}", effect)
    saved = {name: tuple(tensor.shape) for name, tensor in hf_state(directory).items()}
    expected_shapes = {name: shape for name, shape in saved.items() if not name.startswith(family.ignored or (" ",))}
    if different := sorted(set(bridge.spec.hf_shapes.items()) ^ set(expected_shapes.items())):
        return Outcome(change, "error", f"the table and the checkpoint differ in {different[:4]}", effect)
    try:
        # A model that is the same on both sides need not be computed again.
        same = effect == 0.0 and _description(bridge.spec) == unchanged.description
        logits = unchanged.logits if same else _megatron_logits(bridge)
    except Exception as error:
        return Outcome(change, "error", f"{type(error).__name__}: {str(error)[:300]}", effect)
    apart = (logits - expected).abs().max().item() if logits.shape == expected.shape else float("inf")
    allowed = tolerance(expected, bridge.spec.num_layers)
    return Outcome(change, "equal" if apart <= allowed else "different", f"{apart:.2g} apart, allowed {allowed:.2g}", effect)


def _megatron_logits(bridge: AutoBridge) -> Any:
    model = bridge.build_model()
    bridge.load_weights(model)
    return forward_logits(model, TOKENS)
