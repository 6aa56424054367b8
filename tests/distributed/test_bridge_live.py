"""Real Megatron models on real gloo processes: import, export, save, and logits equal to Transformers', on every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import DENSE, FAMILIES, VARIANTS, assert_same_state, hf_state, tiny_checkpoint
from tolerance import assert_near, forward
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel

DENSE_LAYOUTS = {
    "1": (ParallelLayout(), {}),
    "tp2": (ParallelLayout(tp=2), {"sequence_parallel": False}),
    "tp2+sp": (ParallelLayout(tp=2), {"sequence_parallel": True}),
    "tp4": (ParallelLayout(tp=4), {}),
    "pp2": (ParallelLayout(pp=2), {}),
    "pp2-uneven": (ParallelLayout(pp=2, stage_layers=(1, 3)), {}),
    "pp2xvpp2xtp2": (ParallelLayout(tp=2, pp=2, vpp=2), {}),
    "dp2": (ParallelLayout(dp=2), {}),
    "cp2": (ParallelLayout(cp=2), {}),
}
EXPERT_LAYOUTS = {
    "ep2": (ParallelLayout(ep=2, dp=2), {}),
    "ep2-sequential": (ParallelLayout(ep=2, dp=2), {"grouped_experts": False}),
    "tp2xep2xetp1": (ParallelLayout(tp=2, ep=2, etp=1), {}),
    "etp2": (ParallelLayout(tp=2, etp=2), {}),
    "etp2-tp1": (ParallelLayout(etp=2, dp=2), {}),
    "pp2xtp2xep2xetp1": (ParallelLayout(tp=2, pp=2, ep=2, etp=1), {}),
}


def cases() -> Iterator[Any]:
    """Every variant on every layout. In an ordinary run `qwen3-moe` has all layouts, and each other variant has every third
    one, so that all variants together have all of them; the other pairs are for `make nightly`."""
    for number, variant in enumerate(VARIANTS):
        layouts = DENSE_LAYOUTS | (EXPERT_LAYOUTS if "moe" in variant else {})
        for position, (name, layout) in enumerate(layouts.items()):
            is_ordinary = variant == "qwen3-moe" or position % 3 == number % 3
            yield pytest.param(variant, *layout, id=f"{variant}-{name}", marks=() if is_ordinary else pytest.mark.nightly)


def there_and_back(rank: int, directory: Path, layout: ParallelLayout, options: dict[str, Any], tokens: Tensor):
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(layout, **options)
    bridge.load_weights(model)
    exported = dict(bridge.export_weights(model, bucket_bytes=1 << 17))
    bridge.save_pretrained(model, directory / "saved", shard_bytes=1 << 19)
    return exported, forward_logits(model, tokens)


@pytest.mark.parametrize(("variant", "layout", "options"), cases())
def test_there_and_back(variant: str, layout: ParallelLayout, options: dict[str, Any], tmp_path: Path) -> None:
    directory, reference = tiny_checkpoint(tmp_path, variant)
    tokens = torch.randint(0, 515, (2, 16), generator=torch.Generator().manual_seed(0))
    ranks = run_ranks(there_and_back, layout.world_size, directory, layout, options, tokens)
    expected = hf_state(directory)
    for exported, _ in ranks:
        assert_same_state(exported, expected)
    assert_same_state(hf_state(directory / "saved"), expected)
    logits_of_ranks = [logits for _, logits in ranks if logits is not None]
    assert logits_of_ranks
    with torch.no_grad():
        wanted = reference(tokens).logits
    for logits in logits_of_ranks:
        assert logits.shape == wanted.shape
        assert_near(logits, wanted, forward(DENSE["num_hidden_layers"], DENSE["intermediate_size"]), what="logits")


@pytest.mark.parametrize("variant", FAMILIES)
def test_saved_checkpoint_is_transformers_own(variant: str, tmp_path: Path) -> None:
    """Transformers loads what we saved, completely, and computes the same."""
    directory, reference = tiny_checkpoint(tmp_path, variant)
    run_ranks(there_and_back, 2, directory, ParallelLayout(tp=2), {}, torch.zeros(1, 4, dtype=torch.int64))
    loaded, info = type(reference).from_pretrained(directory / "saved", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, reference(tokens).logits)


def export_in(rank: int, directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    initialize_parallel(ParallelLayout(tp=2))
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(dtype=torch.bfloat16)
    bridge.load_weights(model)
    return dict(bridge.export_weights(model, dtype=dtype))


def test_dtypes_are_cast_once(tmp_path: Path) -> None:
    """A bf16 model of an fp32 checkpoint holds rounded weights; exporting in fp32 gives those, exactly."""
    directory, _ = tiny_checkpoint(tmp_path, "qwen2")
    exported = run_ranks(export_in, 2, directory, torch.float32)[1]
    assert_same_state(exported, {name: t.bfloat16().float() for name, t in hf_state(directory).items()})


def broadcasts_of_an_export(rank: int, directory: Path) -> tuple[int, int]:
    initialize_parallel(ParallelLayout(tp=2, pp=2))
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model()
    calls: list[int] = []
    real = torch.distributed.broadcast

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    torch.distributed.broadcast = counted
    exported = dict(bridge.export_weights(model, bucket_bytes=1 << 20, transport="collective"))
    return len(calls), sum(t.numel() * t.element_size() for t in exported.values())


def test_collectives_grow_with_bytes_not_with_parameters(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3-moe")
    for calls, nbytes in run_ranks(broadcasts_of_an_export, 4, directory):
        buckets = -(-nbytes // (1 << 20))
        assert buckets <= calls <= 4 * (buckets + 1)
