"""Adapters in the slots of an in-process engine, without a trainer: what is proven, refused and undone."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import engine_answers
import pytest
import torch
from attached_scenarios import ByName
from engine_answers import PROMPTS, Answers
from ranks import run_ranks
from tiny import DENSE, logit_scale
from tolerance import assert_near, forward
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import PEFT_PREFIX, adapted_linears, adapter_spec
from mbridge_rl.core.buckets import offsets
from mbridge_rl.core.digest import combine, digest
from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, SyncError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import HFTensor
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.megatron.lora.attach import adapted_modules, add_lora
from mbridge_rl.megatron.parallel import initialize_parallel
from mbridge_rl.sync.adapter_sync import AdaptedEngine, AdapterSync
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.adapter_messages import AdapterReport, AdapterUpdate
from mbridge_rl.sync.trainer.engines import Engines
from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.sync.vllm.extension import EXTENSION
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.objectives.loss import supervised_loss
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer, TrainerConfig

OPTIONS = {"max_model_len": 64, "max_num_seqs": 8, "enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


SIZES = {"hidden_size": 256, "head_dim": 32}  # heads of 32: the smallest that vLLM computes on a CPU
ENGINE = {"max_model_len": 64, "max_num_seqs": 8, "enable_lora": True, "max_loras": 4, "max_lora_rank": 8}
# W x + B A x in vLLM against (W + B A) x in Transformers, whose deltas are several times the weights.
ROUNDING = forward(DENSE["num_hidden_layers"], SIZES["hidden_size"])
LOGITS = logit_scale(SIZES["hidden_size"])


def adapter(start: Path, seed: int, rank: int = 4, **config: Any) -> dict[str, Tensor]:
    spec = adapter_spec(AutoBridge.from_pretrained(start).spec, LoRAConfig(rank=rank, **config))
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in spec.hf_shapes.items()}


def put(
    engine: InProcessEngine,
    name: str,
    version: int,
    tensors: dict[str, Tensor],
    rank: int = 4,
    is_policy: bool = False,
    requests: InFlight = "keep",
) -> AdapterReport:
    starts, nbytes = offsets(tensor.nbytes for tensor in tensors.values())
    with Arena.create(nbytes) as arena:
        for tensor, start in zip(tensors.values(), starts, strict=True):
            arena.view(start, tensor.shape, tensor.dtype).copy_(tensor)
        return engine.put_adapter(
            AdapterUpdate(
                adapter=name,
                version=version,
                is_policy=is_policy,
                requests=requests,
                timeout=600.0,
                rank=rank,
                tensors=tuple(HFTensor(hf_name, tensor.dtype, tuple(tensor.shape)) for hf_name, tensor in tensors.items()),
                offsets=tuple(starts),
                digests=tuple(f"{digest(tensor):016x}" for tensor in tensors.values()),
                arena_path=arena.path,
                arena_bytes=nbytes,
            )
        )


def slots_are_proven_and_reverted(start: Path) -> None:
    engine = InProcessEngine(start, **OPTIONS)
    manager = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager

    def answers(name: str | None) -> Any:
        completions = engine.generate([[5, 9, 33], [1, 2, 3, 4]], temperature=0.0, max_tokens=3, adapter=name)
        return [(answer.tokens, answer.logprobs) for answer in completions]

    base, first, second = answers(None), adapter(start, 1), adapter(start, 2)
    report = put(engine, "a", 1, first)
    assert report.digest == combine({name: digest(tensor) for name, tensor in first.items()})
    assert engine.adapter_digests("a") == {name: f"{digest(tensor):016x}" for name, tensor in first.items()}
    served = answers("a")
    assert served != base
    assert answers(None) == base  # base rows use an adapter of zeros

    # One number of the slot is changed: reading it back notices this, and the version before serves on.
    activate = manager.activate_adapter

    def corrupting(slot_id: int) -> bool:
        result = activate(slot_id)
        layer = manager.modules["model.layers.2.self_attn.qkv_proj"]
        layer.lora_b_stacked[1][manager.lora_index_to_id.index(slot_id), 0, 3, 2] += 1e-3
        manager.activate_adapter = activate  # corrupt one slot only
        return result

    manager.activate_adapter = corrupting
    with pytest.raises(DigestMismatch, match=r"1 of 56 factors are not in their slot: .*layers\.2\.self_attn\.k_proj\.lora_B"):
        put(engine, "a", 2, second)
    assert engine.adapter_versions() == {"a": 1}
    assert answers("a") == served

    # Numbers beyond the adapter's rank in its slot are noticed, and so are factors that change later.
    layer = manager.modules["model.layers.0.mlp.down_proj"]
    slot = manager.lora_index_to_id.index(2)
    layer.lora_a_stacked[0][slot, 0, 7, 5] = 1.0
    with pytest.raises(DigestMismatch, match="the slot of adapter 2 holds something beside it"):
        engine.adapter_digests("a")
    layer.lora_a_stacked[0][slot, 0, 7, 5] = 0.0
    layer.lora_a_stacked[0][slot, 0, 1, 5] += 1.0
    changed = [name for name, value in engine.adapter_digests("a").items() if value != f"{digest(first[name]):016x}"]
    assert changed == ["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]

    # Adapters that the engine has no slot for are refused.
    stranger = {name.replace("q_proj", "x_proj"): tensor for name, tensor in second.items()}
    with pytest.raises(EngineMismatch, match=r"no LoRA layer for .*layers\.0\.self_attn\.x_proj\.lora_A"):
        put(engine, "a", 3, stranger)
    with pytest.raises(EngineMismatch, match="slots are float32, the adapter is bfloat16"):
        put(engine, "a", 3, {name: tensor.bfloat16() for name, tensor in second.items()})
    with pytest.raises(EngineMismatch, match="rank 9, the engine takes 8"):
        put(engine, "a", 3, adapter(start, 3, rank=9), rank=9)
    with pytest.raises(EngineMismatch, match=r"adapters of output layers .*WeightSync"):
        put(engine, "a", 3, adapter(start, 3, targets=("output_layer",)))
    put(engine, "a", 4, second)
    put(engine, "b", 1, first)
    assert answers("b") == served
    assert engine.adapter_versions() == {"a": 4, "b": 1}
    engine.close()


def ranks_by_pattern_act_as_merged_weights(start: Path) -> float:
    """How far log-probabilities are from those of Transformers with the merged weights; the tokens are equal."""
    import transformers

    config = LoRAConfig(
        rank=3,
        alpha=5.0,
        targets=("q_proj", "v_proj", "linear_proj", "linear_fc2"),
        canonical=True,
        rank_pattern={"linear_proj": 5, r".*layers\.1\.self_attn\..*": 2},
        alpha_pattern={"down_proj": 9.0},
        layers={"q_proj": (1, 2), "linear_proj": (0, 1), "linear_fc2": (3,)},
    )
    spec = AutoBridge.from_pretrained(start).spec
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    generator, state = torch.Generator().manual_seed(1), model.state_dict()
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.15 for name, shape in adapter_spec(spec, config).hf_shapes.items()
    }
    for name, own in adapted_linears(spec, config).items():
        factor_a, factor_b = (f"{PEFT_PREFIX}{name}.lora_{which}.weight" for which in "AB")
        tensors[factor_b] *= own.scale
        state[f"{name}.weight"] += tensors[factor_b] @ tensors[factor_a]
    with InProcessEngine(start, **OPTIONS) as engine:
        assert put(engine, "a", 1, tensors, rank=config.largest_peft_rank).proven == len(tensors)
        (answer,) = engine.generate([[5, 9, 33, 100, 514]], temperature=0.0, max_tokens=4, adapter="a")
    with torch.no_grad():
        logits = model(torch.tensor([[5, 9, 33, 100, 514, *answer.tokens]])).logits[0, 4:-1].log_softmax(-1)
    assert logits.argmax(-1).tolist() == answer.tokens
    return (logits.amax(-1) - torch.tensor(answer.logprobs)).abs().max().item()


def tokens_are_labelled_with_the_policys_versions(start: Path) -> None:
    """Each token has the version of the policy that sampled it, also if an update comes amid its request or ends it."""
    engine = InProcessEngine(start, **OPTIONS)
    policies = [adapter(start, seed) for seed in range(4)]
    put(engine, "policy", 5, policies[0], is_policy=True)
    assert engine.weight_version == 5
    for version, requests in ((6, "keep"), (7, "abort"), (8, "wait")):
        with ThreadPoolExecutor() as pool:
            request = pool.submit(engine.generate, [[5, 9, 33]], max_tokens=50, ignore_eos=True, adapter="policy")
            while not engine._requests.in_flight:
                time.sleep(1e-3)
            put(engine, "policy", version, policies[version - 5], is_policy=True, requests=requests)
            (answer,) = request.result()
        assert engine.weight_version == version
        assert set(answer.token_versions) <= {version - 1, version}
        assert answer.finish_reason == ("abort" if requests == "abort" else "length")
        if requests == "keep":
            assert answer.token_versions[-1] == version
        if requests == "wait":
            assert set(answer.token_versions) == {version - 1}
    put(engine, "other", 20, policies[0])
    assert engine.weight_version == 8
    engine.close()


def adapters_by_names_and_json(start: Path) -> None:
    """Two clients reach an engine that somebody else runs, and each sees the adapters that the other one has put there."""
    with InProcessEngine(start, **OPTIONS, worker_extension_cls=EXTENSION) as inner:
        engine, other = ByName(inner), ByName(inner)
        (base,) = engine.generate([[5, 9, 33]])
        first, second = adapter(start, 1), adapter(start, 2)
        put(engine, "a", 1, first)
        (answer,) = other.generate([[5, 9, 33]], adapter="a")
        assert answer.adapter == "a@1"
        assert answer.tokens != base.tokens
        put(other, "a", 2, second)
        assert engine.adapter_versions() == {"a": 2}
        assert engine.adapter_digests("a") == {name: f"{digest(tensor):016x}" for name, tensor in second.items()}
        answers = engine.generate([[5, 9, 33]] * 2, adapter=["a", None])
        assert [one.adapter for one in answers] == ["a@2", "base"]
        assert answers[0].tokens not in (base.tokens, answer.tokens)
        assert answers[1].tokens == base.tokens
        assert not engine.halted
        with pytest.raises(EngineMismatch, match="'base' names what base rows have"):
            put(engine, "base", 1, first)
        engine.remove_adapter("a")
        with pytest.raises(SyncError, match="holds no adapter 'a'; found none"):
            other.generate([[5, 9, 33]], adapter="a")


def an_engine_without_lora_says_so(start: Path) -> None:
    with InProcessEngine(start, max_model_len=64, max_num_seqs=8) as engine:
        with pytest.raises(EngineMismatch, match="started without LoRA: give it enable_lora=True"):
            engine.adapter_info()
        assert engine.generate([[1, 2, 3]], max_tokens=1)[0].adapter is None


def experts_beside_adapters_are_refused(start: Path) -> None:
    """vLLM takes its Triton kernels for experts as soon as an engine has LoRA."""
    with (
        InProcessEngine(start, **OPTIONS, lora_target_modules=["qkv_proj", "o_proj"]) as engine,
        pytest.raises(EngineMismatch, match=r"experts beside LoRA with Triton.*WeightSync"),
    ):
        engine.adapter_info()


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


def greedy(engine: EngineProcess, adapter: Any, prompts: list[list[int]] = PROMPTS) -> Answers:
    answers = engine.generate(prompts, temperature=0.0, max_tokens=4, adapter=adapter)
    return [(answer.tokens, answer.logprobs) for answer in answers]


def greedy_of_transformers(start: Path, state: dict[str, torch.Tensor]) -> Answers:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    model.load_state_dict(state, strict=False)
    return engine_answers.greedy_of_transformers(model, 4)


def assert_close(answers: Answers, expected: Answers) -> None:
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(answers, expected, strict=True):
        assert tokens == wanted
        assert_near(logprobs, wanted_logprobs, ROUNDING, scale=LOGITS, what="log-probabilities")


def assert_equal(answers: Answers, expected: Answers) -> None:
    assert answers == expected


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
