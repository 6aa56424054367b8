"""Three adapters that Megatron ranks train and sync in turn into one engine, for `tests/vllm/test_vllm_adapters.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from adapter_scenarios import LOGITS, ROUNDING, assert_close, assert_equal, greedy, greedy_of_transformers
from engine_answers import PROMPTS
from ranks import run_ranks
from tolerance import assert_near

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.megatron.lora.attach import adapted_modules, add_lora
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.adapter_sync import AdaptedEngine, AdapterSync
from mbridge_rl.sync.payload.adapter_messages import AdapterReport, AdapterUpdate
from mbridge_rl.sync.trainer.engines import Engines
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig


def adapt_in_turn(
    layout: ParallelLayout, start: Path, config: LoRAConfig, start_engine: Callable[[], Any], updates: int, timeout: float = 240
) -> None:
    first, *others = run_ranks(
        three_adapters_in_turn, layout.world_size, start, layout, config, start_engine, updates, timeout=timeout
    )
    assert first["checks"] == {6: 9, 4: 5}[updates]
    assert_near(first["policies_differ"], 0.0, ROUNDING, scale=LOGITS, what="the policy's log-probabilities")
    assert first["versions"] == {name: "abcacb"[:updates].rindex(name) + 1 for name in "abc"}
    for report in first["reports"]:
        assert (report.adapter in "abc", report.transport) == (True, "shared_memory")
        assert report.engine["digest"] == report.digest
        assert report.engine["proven"] == report.tensors
        assert report.engine["bytes"] == report.nbytes
        assert report.nbytes < 0.2 * first["model_bytes"]  # tiny models: rank 4 of width 256
    assert len({report.digest for report in first["reports"]}) == updates
    for other in others:
        assert [report.digest for report in other["reports"]] == [report.digest for report in first["reports"]]


def three_adapters_in_turn(
    rank: int, start: Path, layout: ParallelLayout, config: LoRAConfig, start_engine: Callable[[], Any], updates: int
) -> dict[str, Any]:
    initialize_parallel(layout)
    bridge = AutoBridge.from_pretrained(start)
    model = bridge.build_model()
    bridge.load_weights(model)
    add_lora(model, config)
    engine = start_engine() if rank == 0 else None
    assert_alike = assert_equal if isinstance(engine, EngineProcess) else assert_close  # other engines batch by arrival
    base = greedy(engine, None) if engine else None
    syncs = {name: AdapterSync(bridge, model, engine, name) for name in "abc"}
    results: dict[str, Any] = {"reports": [], "checks": 0}
    for version, name in enumerate("abcacb"[:updates], start=1):
        others = [other for other in "abc" if engine and other != name and other in engine.adapter_versions()]
        before = {other: (engine.adapter_digests(other), greedy(engine, other)) for other in others} if engine else {}
        fill(model, seed=version)
        report = syncs[name].sync(version)
        merged = dict(bridge.export_weights(model))
        results["reports"].append(report)
        if engine is None:
            continue
        assert_close(greedy(engine, name), greedy_of_transformers(start, merged))
        assert greedy(engine, name) != base
        for other, (digests, answers) in before.items():
            assert engine.adapter_digests(other) == digests
            assert_alike(greedy(engine, other), answers)
            results["checks"] += 1
        assert engine.adapter_versions()[name] == version
        (answer, *_) = engine.generate(PROMPTS[:1], max_tokens=1, adapter=name)
        assert answer.adapter == f"{name}@{version}"
    if engine is not None:
        mixed = greedy(engine, ["a", None, "c", "b", None], [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]])
        a, b, c = (greedy(engine, name) for name in "abc")
        assert_close(mixed, [a[0], base[0], c[1], b[0], base[1]])
        results["versions"] = engine.adapter_versions()

    # A bit flips on the way: the sync fails, and the version before serves on.
    served = (engine.adapter_digests("a"), greedy(engine, "a")) if engine else None
    if engine is not None:
        syncs["a"]._engines = Engines([TearsABit(engine, syncs["a"])])  # type: ignore[list-item]
    fill(model, 9)
    with pytest.raises(DigestMismatch, match=r"1 of \d+ factors arrived with other bytes"):
        syncs["a"].sync(20)
    if engine is not None:
        assert engine.adapter_digests("a") == served[0]
        assert_alike(greedy(engine, "a"), served[1])
        assert engine.adapter_versions() == results["versions"]
        syncs["a"]._engines = Engines([engine])
    with pytest.raises(EngineMismatch, match="has 4 LoRA slots, one of them for base rows, and holds a, b, c"):
        AdapterSync(bridge, model, engine, "d").sync(1)
    if engine is not None:
        engine.remove_adapter("c")
        with pytest.raises(SyncError, match="holds no adapter 'c'; found a, b"):
            greedy(engine, "c")
    AdapterSync(bridge, model, engine, "d").sync(1)
    if engine is not None:
        assert_close(greedy(engine, None), base)
    results["policies_differ"] = trained_policy_is_sampled(bridge, model, engine)
    if engine is not None:
        engine.close()
    for sync in syncs.values():
        sync.close()
    results["model_bytes"] = sum(tensor.nbytes for tensor in bridge.metadata(torch.float32))
    return results


def fill(model: list[torch.nn.Module], seed: int) -> None:
    """Random factors; what ranks hold alike stays alike, and each row of `B` is its own through its sign."""
    rank = torch.distributed.get_rank()
    for index, (_, module) in enumerate(adapted_modules(model)):
        for name in module.adapter_parameter_names:
            factor = getattr(module, name)
            sharded = factor.tensor_model_parallel
            generator = torch.Generator().manual_seed(1000 * seed + 10 * index + (rank + 1 if sharded else 0))
            factor.data.copy_(torch.randn(factor.shape, generator=generator) * 0.15)


class TearsABit:
    """An engine behind a wire that flips a bit of the adapter."""

    def __init__(self, engine: EngineProcess, sync: AdapterSync) -> None:
        self._engine, self._sync = engine, sync

    def put_adapter(self, update: AdapterUpdate) -> AdapterReport:
        self._sync._arena.view(update.offsets[3], (1,), torch.uint8).bitwise_xor_(1)
        return self._engine.put_adapter(update)


def trained_policy_is_sampled(bridge: AutoBridge, model: list[torch.nn.Module], engine: EngineProcess | None) -> float:
    """Takes two real steps, syncs and samples; returns how far the trainer's log-probabilities are from the engine's."""
    fill(model, 1)
    trainer = MegatronTrainer(model, TrainerConfig(learning_rate=1e-2))
    batch = Batch.from_completions(PROMPTS, [[7, 8, 9], [10, 11]], pad_token_id=0)
    for _ in range(2):
        trainer.step(batch, supervised_loss)
    local_sync = AdapterSync(bridge, trainer.model, engine, "d")
    local = local_sync.sync(1)
    local_sync.close()
    # With every rank and the engine on a machine of its own, as simulated here, the same bytes are sent.
    with patch("mbridge_rl.sync.adapter_sync.machine_id", str), patch.object(RankGroup, "on_one_machine", False):
        remote_sync = AdapterSync(bridge, trainer.model, engine, "d")
    remote = remote_sync.sync(2)
    assert (remote.digest, remote.nbytes, remote.verified) == (local.digest, local.nbytes, True)
    remote_sync.close()
    sampled = [torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4)]
    if engine is not None:
        answers = AdaptedEngine(engine, "d").generate(PROMPTS, max_tokens=4, seed=3, ignore_eos=True)
        assert {answer.weight_version for answer in answers} == {2}
        sampled = [torch.tensor([answer.tokens for answer in answers]), torch.tensor([answer.logprobs for answer in answers])]
    for tensor in sampled:
        torch.distributed.broadcast(tensor, 0)
    tokens, engine_log_probs = sampled
    batch = Batch.from_completions(PROMPTS, tokens.tolist(), pad_token_id=0)
    log_probs = trainer.compute_log_probs(batch).log_probs[batch.mask]
    return (log_probs - engine_log_probs.flatten()).abs().max().item()
