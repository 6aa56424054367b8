"""Adapters in the slots of an in-process engine, without a trainer: what is proven, refused and undone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_answers
import pytest
import torch
from attached_scenarios import ByName
from engine_answers import PROMPTS, Answers
from tiny import DENSE, logit_scale
from tolerance import assert_near, forward
from torch import Tensor

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import PEFT_PREFIX, adapted_linears, adapter_spec
from mbridge_rl.core.buckets import offsets
from mbridge_rl.core.digest import combine, digest
from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, SyncError
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.model import HFTensor
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.sync.options import InFlight
from mbridge_rl.sync.payload.adapter_messages import AdapterReport, AdapterUpdate
from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.sync.vllm.extension import EXTENSION

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
