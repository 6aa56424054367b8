"""A NaN in the policy is refused before anything is sent, whatever the way and the format; the engines go on serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from delta_samples import SCHEME, quantized_state
from ranks import run_ranks
from standin import StandInEngine, light_model, random_weights
from sync_cases import WAYS

from mbridge_rl.core.errors import NonFiniteWeights
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.transports.files import FilesOutlet
from mbridge_rl.sync.transports.process_group import GroupOutlet
from mbridge_rl.sync.transports.shared_memory import RingOutlet, SlotOutlet
from mbridge_rl.sync.weight_sync import WeightSync

OUTLETS: list[Any] = [SlotOutlet, RingOutlet, GroupOutlet, FilesOutlet]


def poisoned(rank: int, url: str) -> None:
    placed: list[Any] = []
    for kind in OUTLETS:
        kind.place = lambda outlet, *part, place=kind.place: (placed.append(part), place(outlet, *part))[1]
    state = {name: tensor.bfloat16() for name, tensor in random_weights("qwen3", 1).items()}
    bridge, model = light_model("qwen3", ParallelLayout(tp=2), rank, state)
    values = next(iter(model[0].parameters())).data.view(-1)
    for quantization in (None, SCHEME):
        served = state if quantization is None else quantized_state(state)
        engines = [StandInEngine(state=served) for _ in range(2)] if rank == 0 else None
        for mode, transport in WAYS if quantization is None else WAYS[:3]:
            options = {"mode": mode, "transport": transport, "quantization": quantization, "url": url}
            sync = WeightSync(bridge, model, engines, bucket_bytes=1 << 13, timeout=20.0, **options)
            sync.sync(1)
            before = [engine.generate() for engine in engines or ()]
            if engines is not None:
                calls = [_record_updates(engine) for engine in engines]
            good, bad = values[3].clone(), float("nan") if mode == "staged" else float("-inf")
            placed.clear()
            if rank == 1:
                values[3] = bad
            with pytest.raises(NonFiniteWeights, match="rank 1: 1 parameters hold NaN or infinity"):
                sync.sync(2)
            assert not placed, (mode, transport, quantization)
            values[3] = good
            if engines is not None:
                assert calls == [[], []]  # no engine was sent an update
                assert [engine.generate() for engine in engines] == before
                for engine in engines:
                    del engine.begin
            sync.sync(3)
            assert placed
            sync.close()
        for engine in engines or ():
            engine.close()


def _record_updates(engine: StandInEngine) -> list[Any]:
    """Lets the engine record the updates that begin from now on; returns the list that they are appended to."""
    calls: list[Any] = []
    begin = engine.begin
    engine.begin = lambda update: (calls.append(update), begin(update))[1]  # type: ignore[method-assign]
    return calls


def test_a_nan_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    run_ranks(poisoned, 2, str(tmp_path), timeout=240)
