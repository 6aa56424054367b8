"""Every family, from a tiny random checkpoint by Transformers' own class: names, round trips, logits, adapters, refit.

docs/models.md is made of what passes here (`make support-table`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import family_scenarios as scenarios
import pytest
import torch
from families import FAMILIES
from families.family import REFERENCE
from family_scenarios import TOKENS, assert_close_logits
from interpreter import Interpreter
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state
from tolerance import assert_near

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout

LORA = [variant for variant, family in FAMILIES.items() if not isinstance(family.lora, str)]
ENGINES = [variant for variant, family in FAMILIES.items() if not isinstance(family.engine, str)]

# Found by the interpreter of engines only.
STAND_INS = Path(__file__).parents[1] / "support" / "stub_torchvision"


@pytest.fixture(scope="module")
def engines() -> Iterator[Interpreter]:
    pytest.importorskip("vllm")
    interpreter = Interpreter(PYTHONPATH=os.pathsep.join([str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    yield interpreter
    interpreter.close()


def expected_state(directory: Path, variant: str) -> dict[str, torch.Tensor]:
    """The checkpoint without what the family's bridge leaves alone."""
    ignored = FAMILIES[variant].ignored
    return {name: tensor for name, tensor in hf_state(directory).items() if not name.startswith(ignored or (" ",))}


def as_on_the_hub(directory: Path) -> None:
    """Where Transformers saves a checkpoint otherwise than those on the hub are, which engines read, put it as it is there."""
    saved = AutoBridge.from_pretrained(directory)
    hub, alone = AutoBridge.from_config(saved.hf_config), ParallelLayout()
    if hub.spec.hf_shapes != saved.spec.hf_shapes:
        save_file(hub.unshard(saved.shard(hf_state(directory), alone), alone), directory / "model.safetensors")


def admitted(bridge: AutoBridge) -> Iterator[ParallelLayout]:
    """Every layout of TP, PP, VPP, EP and ETP in {1, 2, 3, 4} that the model admits; dp is what makes the expert axes fit."""
    layers = bridge.spec.num_layers
    for tp, (pp, vpp), ep, etp in itertools.product((1, 2, 3, 4), ((1, 1), (2, 1), (2, 2), (4, 1)), (1, 2, 3), (1, 2)):
        if not bridge.spec.num_experts and (ep, etp) != (1, 1):
            continue
        stages = pp * vpp
        split = tuple(layers * (stage + 1) // stages - layers * stage // stages for stage in range(stages))
        try:
            layout = ParallelLayout(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=ep * etp, stage_layers=split)
            bridge.spec.validate(layout)
        except LayoutError:
            continue
        yield layout


@pytest.mark.parametrize("variant", FAMILIES)
def test_names_and_round_trips(variant: str, tmp_path: Path) -> None:
    """The table knows every tensor of the checkpoint, and every admissible layout gives back the same bits."""
    FAMILIES[variant].checkpoint(tmp_path)
    bridge, expected = AutoBridge.from_pretrained(tmp_path), expected_state(tmp_path, variant)
    announced = {tensor.hf_name: tensor.shape for tensor in bridge.metadata(torch.float32)}
    assert announced == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    layouts = list(admitted(bridge))
    assert {layout.tp for layout in layouts} >= {1, 2}
    assert {layout.num_stages for layout in layouts} >= {1, 2}
    for layout in layouts:
        assert_same_state(bridge.unshard(bridge.shard(expected, layout), layout), expected)


@pytest.mark.parametrize("variant", FAMILIES)
def test_logits(variant: str, tmp_path: Path) -> None:
    family = FAMILIES[variant]
    reference = family.checkpoint(tmp_path)
    family.skip_if_transformers_is_wrong()
    [(_, logits)] = run_ranks(scenarios.there_and_back, 1, tmp_path, ParallelLayout(), TOKENS)
    assert_close_logits(logits, reference, family.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FAMILIES)
def test_sharded(variant: str, tmp_path: Path) -> None:
    """Real processes import, export and save the checkpoint bit for bit, and their logits are Transformers'."""
    family = FAMILIES[variant]
    reference = family.checkpoint(tmp_path)
    ranks = run_ranks(scenarios.there_and_back, family.layout.world_size, tmp_path, family.layout, TOKENS)
    expected = expected_state(tmp_path, variant)
    for exported, _ in ranks:
        assert_same_state(exported, expected)
    assert_same_state(hf_state(tmp_path / "saved"), expected)
    family.skip_if_transformers_is_wrong()
    logits_of_ranks = [logits for _, logits in ranks if logits is not None]
    assert logits_of_ranks
    for logits in logits_of_ranks:
        assert_close_logits(logits, reference, family.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("variant", LORA)
def test_lora(variant: str, tmp_path: Path) -> None:
    """Adapted logits equal Transformers' with the merged weights that an export gives."""
    family = FAMILIES[variant]
    family.checkpoint(tmp_path)
    (adapted, base), *_ = run_ranks(scenarios.adapted_logits, 1, tmp_path, family.lora, TOKENS)
    assert (adapted - base).abs().max() > 100 * family.tolerance * base.abs().max()
    reference = type(family.model()).from_pretrained(tmp_path / "merged", **REFERENCE).eval()
    assert_close_logits(adapted, reference, family.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ENGINES)
def test_refit(variant: str, engines: Interpreter, tmp_path: Path) -> None:
    """An engine that started with other weights equals a fresh one after the refit, and in fp32 Transformers."""
    family = FAMILIES[variant]
    dtype = getattr(torch, family.engine.get("dtype", "float32"))
    family.checkpoint(tmp_path / "A", seed=1, dtype=dtype)
    reference = family.checkpoint(tmp_path / "B", seed=2, dtype=dtype)
    for tag in "AB":
        as_on_the_hub(tmp_path / tag)
    completions = engines.call(scenarios.refit_equals_fresh_engine, tmp_path, dict(family.engine))
    if dtype != torch.float32:  # half precision: near-ties and routing fall otherwise in other kernels
        return
    for prompt, completion in zip(scenarios.PROMPTS, completions, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + completion.tokens]), use_cache=False).logits[0].float()
        expected = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        chosen = expected[range(len(completion.tokens)), completion.tokens]
        size = expected.abs().max().item()
        assert_near(completion.logprobs, chosen, family.tolerance, scale=size, what="log-probabilities")
        assert_near(chosen, expected.max(-1).values, family.tolerance, scale=size, what="greedy choices, up to ties")
