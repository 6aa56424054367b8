"""Where Transformers' model and vLLM's differ, a bridge follows either, and says so."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import family_scenarios as scenarios
import pytest
import torch
from families import FAMILIES
from interpreter import Interpreter
from published.checkpoint import checkpoint, published_config
from ranks import run_ranks
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.bridges import Numerics
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.megatron.parallel_mixers import bound_time_steps

TOKENS = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))
LATENT = ["moonshotai--Moonlight-16B-A3B", "zai-org--GLM-4.7-Flash"]
MAMBA = "nvidia--NVIDIA-Nemotron-Nano-9B-v2"
# fp32 kernels of two libraries over a few layers, as in test_families.py.
LOGPROB_TOLERANCE = 1e-3
STAND_INS = Path(__file__).parents[1] / "support" / "stub_torchvision"  # found by the interpreter of engines only
TOLERANCE = 1e-4  # of the logits' standard deviation, as in test_published.py


def model_of(name: str, directory: Path) -> nn.Module:
    """One whose latents, or whose time steps, are small enough for the difference to show."""
    return checkpoint(published_config(name), directory, change=_make_small)


def _make_small(parameter: str, tensor: Tensor) -> None:
    if parameter.endswith(("kv_a_proj_with_mqa.weight", "q_a_proj.weight")):
        tensor.mul_(3e-3)
    if parameter.endswith("dt_bias"):
        tensor.sub_(8.0)


def as_in_vllm(reference: nn.Module) -> None:
    for name, module in reference.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = reference.config.rms_norm_eps
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))


def logits(rank: int, directory: Path, layout: ParallelLayout, numerics: Numerics) -> Any:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory, numerics=numerics)
    model = bridge.build_model(layout, dtype=torch.float32)
    bridge.load_weights(model)
    return forward_logits(model, TOKENS)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2)], ids=["one", "tp2"])
@pytest.mark.parametrize("name", [*LATENT, MAMBA])
def test_logits_are_those_of_either(name: str, layout: ParallelLayout, tmp_path: Path) -> None:
    reference = model_of(name, tmp_path)
    computed = {
        numerics: run_ranks(logits, layout.world_size, tmp_path, layout, numerics)[0] for numerics in ("transformers", "vllm")
    }
    with torch.no_grad():
        wanted = {"transformers": reference(TOKENS, use_cache=False).logits}
        as_in_vllm(reference)
        wanted["vllm"] = reference(TOKENS, use_cache=False).logits
    spread = wanted["vllm"].std()
    assert (wanted["transformers"] - wanted["vllm"]).abs().max() > 100 * TOLERANCE * spread
    for numerics, expected in wanted.items():
        assert (computed[numerics] - expected).abs().max() < TOLERANCE * spread, numerics


@pytest.mark.parametrize(
    ("name", "what"), [*((name, "epsilon of latent attention's norms") for name in LATENT), (MAMBA, "Mamba's time steps")]
)
def test_a_difference_is_said(name: str, what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_of(name, tmp_path)
    with caplog.at_level(logging.WARNING, "mbridge_rl"):
        AutoBridge.from_pretrained(tmp_path, numerics="vllm")
        assert not differences_in(caplog)
        AutoBridge.from_pretrained(tmp_path)
    (message,) = differences_in(caplog)
    assert what in message
    assert 'numerics="vllm"' in message


def differences_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of numerics; fields without effect are said as well."""
    return [message for message in caplog.messages if "fields without effect" not in message]


def test_no_warning_where_they_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint(published_config("deepseek-ai--DeepSeek-R1"), tmp_path)
    with caplog.at_level(logging.WARNING, "mbridge_rl"):
        AutoBridge.from_pretrained(tmp_path)
    assert not differences_in(caplog)


def test_time_steps_and_their_gradients_are_a_clamps() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dt_bias = nn.Parameter(torch.linspace(-9.0, 1.0, 5))
            self.cp = type("CP", (), {"pre_conv_ssm": staticmethod(lambda projected, _: projected)})()

    mixer, minimum = Mixer(), 1e-3
    bound_time_steps(mixer, minimum)
    projected = torch.randn(6, 1, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    following = torch.randn(6, 1, 5, generator=torch.Generator().manual_seed(1))

    bounded = nn.functional.softplus(mixer.cp.pre_conv_ssm(projected, None)[..., -5:] + mixer.dt_bias)
    expected = nn.functional.softplus(projected[..., -5:] + mixer.dt_bias).clamp(min=minimum)
    assert (expected == minimum).any()
    assert (expected > minimum).any()
    torch.testing.assert_close(bounded, expected)
    gradients = [torch.autograd.grad(steps, (projected, mixer.dt_bias), following) for steps in (bounded, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def engines() -> Iterator[Interpreter]:
    pytest.importorskip("vllm")
    interpreter = Interpreter(PYTHONPATH=os.pathsep.join([str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    yield interpreter
    interpreter.close()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["moonlight", "nemotron-h"])
def test_vllm_does_what_is_said(variant: str, engines: Interpreter, tmp_path: Path) -> None:
    """An engine gives the log-probabilities of Transformers' model with the difference undone, and not of that as it is."""
    family = FAMILIES[variant]
    reference = family.model()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            _make_small(name, parameter)
    reference.save_pretrained(tmp_path)
    completions = engines.call(scenarios.greedy_of_engine, tmp_path, dict(family.engine))
    distances = []
    for change in (lambda _: None, as_in_vllm):
        change(reference)
        distances.append(max(map(_distance_to(reference), scenarios.PROMPTS, completions)))
    assert distances[0] > 10 * LOGPROB_TOLERANCE
    assert distances[1] < LOGPROB_TOLERANCE


def _distance_to(reference: nn.Module) -> Callable[[list[int], Any], float]:
    def distance(prompt: list[int], completion: Any) -> float:
        with torch.no_grad():
            wanted = reference(torch.tensor([prompt + completion.tokens]), use_cache=False).logits[0].float()
        chosen = torch.log_softmax(wanted[len(prompt) - 1 : -1], -1)[range(len(completion.tokens)), completion.tokens]
        return (chosen - torch.tensor(completion.logprobs)).abs().max().item()

    return distance
