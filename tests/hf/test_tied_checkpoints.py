"""Checkpoints whose config says `tie_word_embeddings`, and what they really hold: the output layer alone, beside the embedding
and equal, or beside it and another tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live import live, raised
from ranks import run_ranks
from safetensors.torch import save_file
from tiny import assert_same_state, hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import StateMismatchError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.hf.tied import same_values
from mbridge_rl.megatron.forward import forward_logits

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = torch.randint(0, 515, (2, 16), generator=torch.Generator().manual_seed(0))
LAYOUT = ParallelLayout(tp=2, pp=2)


def another(tensor: Tensor) -> Tensor:
    return 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))


def stored(directory: Path, how: str) -> Path:
    """A tied Qwen3 whose checkpoint holds its output layer `how`."""
    tiny_checkpoint(directory, "qwen3-tied")
    state = hf_state(directory)
    match how:
        case "alone":
            state[HEAD] = state.pop(EMBEDDING)
        case "equal":
            state[HEAD] = state[EMBEDDING].clone()
        case "one number apart":
            state[HEAD] = state[EMBEDDING].clone()
            state[HEAD][-1, -1] += 1e-6
        case "another":
            state[HEAD] = another(state[EMBEDDING])
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logits_and_save(rank: int, directory: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    bridge, model = live(LAYOUT, directory)
    bridge.save_pretrained(model, directory / "saved")
    return dict(bridge.export_weights(model)), forward_logits(model, TOKENS)


@pytest.mark.parametrize("how", ["alone", "equal", "one number apart", "another"])
def test_the_model_is_the_one_that_transformers_loads(how: str, tmp_path: Path) -> None:
    """The model has Transformers' logits. It exports and saves either an output layer of its own with a config that says so, or
    none."""
    directory = stored(tmp_path, how)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ranks = run_ranks(logits_and_save, 4, directory)
    with torch.no_grad():
        expected = reference(TOKENS).logits
    computed = next(logits for _, logits in ranks if logits is not None)
    assert (computed - expected).abs().max() < 1e-4  # fp32 sums over 136 numbers and four layers, in another order
    differs = how in ("one number apart", "another")
    state = hf_state(directory)
    state[EMBEDDING] = state.get(EMBEDDING, state.get(HEAD))
    if not differs:
        state.pop(HEAD, None)
    assert_same_state(ranks[0][0], state)
    assert_same_state(hf_state(directory / "saved"), state)
    assert json.loads((directory / "saved" / "config.json").read_text())["tie_word_embeddings"] is not differs


def test_a_quantized_head_is_compared_dequantized(tmp_path: Path) -> None:
    directory = stored(tmp_path, "equal")
    state = hf_state(directory)
    state[HEAD] = (state[HEAD] / 2).to(torch.float8_e4m3fn)
    state[EMBEDDING] = state[HEAD].float() * 2
    state[f"{HEAD}_scale"] = torch.tensor(2.0)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "fp8"}, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config | quantized))
    assert AutoBridge.from_pretrained(directory).spec.tied_embeddings
    state[f"{HEAD}_scale"] = torch.tensor(3.0)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    assert not AutoBridge.from_pretrained(directory).spec.tied_embeddings


def test_a_vision_language_model_is_untied_at_both_levels(tmp_path: Path) -> None:
    from families import FAMILIES

    FAMILIES["gemma3-vl"].checkpoint(tmp_path)
    state = hf_state(tmp_path)
    bridge = AutoBridge.from_pretrained(tmp_path)
    assert bridge.spec.tied_embeddings
    ((head, embedding),) = bridge.spec.aliases.items()
    save_file({**state, head: another(state[embedding])}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    bridge = AutoBridge.from_pretrained(tmp_path)
    assert head in bridge.spec.hf_shapes
    assert bridge.hf_config.tie_word_embeddings is False
    assert bridge.hf_config.text_config.tie_word_embeddings is False


def load_into_a_tied_model(rank: int, tied: Path, sources: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    bridge, model = live(LAYOUT, tied)
    errors = {}
    for name, source in sources.items():
        before = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
        given = iter(source) if isinstance(source, list) else source
        error = raised(lambda given=given: bridge.load_weights(model, given))
        after = [parameter for chunk in model for parameter in chunk.parameters()]
        errors[name] = (error, all(map(torch.equal, before, after)))
    return errors


def test_a_model_that_was_built_tied_refuses_another_head(tmp_path: Path) -> None:
    """From a directory, a state dict, a stream in either order: named, and nothing is changed."""
    tied, other = stored(tmp_path / "tied", "equal"), stored(tmp_path / "other", "another")
    state = hf_state(other)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    backwards = list(reversed(list(changed.items())))
    sources = {"directory": other, "state": changed, "stream": list(changed.items()), "backwards": backwards}
    for errors in run_ranks(load_into_a_tied_model, 4, tied, sources):
        for name, (error, unchanged) in errors.items():
            assert error.startswith(StateMismatchError.__name__), name
            assert HEAD in error, name
            assert EMBEDDING in error, name
            assert "tie_word_embeddings" in error, name
            assert unchanged, name
    with pytest.raises(StateMismatchError, match="tie_word_embeddings=False"):
        AutoBridge.from_pretrained(tied).shard(state, ParallelLayout())


def load_either_name(rank: int, directory: Path, sources: dict[str, Any]) -> dict[str, bool]:
    bridge, model = live(LAYOUT, directory)
    expected = dict(bridge.export_weights(model))
    equal = {}
    for name, source in sources.items():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.data.zero_()
        bridge.load_weights(model, iter(source) if isinstance(source, list) else source)
        exported = dict(bridge.export_weights(model))
        equal[name] = all(torch.equal(exported[hf_name], expected[hf_name]) for hf_name in expected)
    return equal


def test_either_name_or_both_will_do_in_every_source(tmp_path: Path) -> None:
    directory = stored(tmp_path, "equal")
    both = hf_state(directory)
    head_alone = {name: tensor for name, tensor in both.items() if name != EMBEDDING}
    sources = {
        "both": both,
        "head alone": head_alone,
        "stream of both": list(both.items()),
        "stream of both, backwards": list(reversed(list(both.items()))),
        "stream of the head alone": list(head_alone.items()),
    }
    for equal in run_ranks(load_either_name, 4, directory, sources):
        assert all(equal.values()), equal


def test_values_are_compared_by_their_bits() -> None:
    """NaN equals itself, and a zero no negative zero; of two dtypes, as numbers."""
    values = torch.randn(9000, 3)
    values[0, 0] = float("nan")
    assert same_values(values, values.clone())
    assert not same_values(torch.zeros(2, 2), -torch.zeros(2, 2))
    rounded = torch.randn(9000, 3).bfloat16()
    assert same_values(rounded, rounded.float())
    assert not same_values(rounded, rounded.float().index_fill(0, torch.tensor([8999]), 2.0))
    assert not same_values(values, values[:-1])
