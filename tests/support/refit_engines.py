"""Checkpoints, engines and a trainer: what the scenarios of `refit_scenarios.py` are played with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from standin import plain_trainer, set_weights
from torch import Tensor

from mbridge_rl.core.digest import combine, digest
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.compatibility import config_summary
from mbridge_rl.sync.payload.messages import UpdateRequest
from mbridge_rl.sync.record.report import SyncReport
from mbridge_rl.sync.store.image import new_fill
from mbridge_rl.sync.transports.shared_memory import RingOutlet, SlotOutlet
from mbridge_rl.sync.vllm.engines.in_process import Completion, InProcessEngine
from mbridge_rl.sync.weight_sync import WeightSync

PROMPTS = [[5, 9, 33, 100, 514], [11, 22, 33, 44, 55, 66, 77, 514], [400]]
FAMILIES = ("qwen3", "llama_tied", "qwen2_tied", "qwen3_moe")
VOCABULARY = 515  # odd, so that vLLM pads it


def make_checkpoints(directory: Path) -> None:
    """Two random checkpoints, A and B, of each family."""
    import transformers

    dense: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=192,  # heads of 32: the smallest that vLLM computes on a CPU
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    experts = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, decoder_sparse_step=1)
    configs = {
        "qwen3": transformers.Qwen3Config(**dense, head_dim=32),
        "llama_tied": transformers.LlamaConfig(**dense | {"tie_word_embeddings": True}),
        "qwen2_tied": transformers.Qwen2Config(**dense | {"tie_word_embeddings": True}),  # its attention has biases
        "qwen3_moe": transformers.Qwen3MoeConfig(**dense, **experts, head_dim=32),
    }
    for name, config in configs.items():
        for seed, tag in enumerate("AB"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            _randomize(model, seed)
            model.save_pretrained(directory / name / tag)


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights so large that logits differ, and no parameter at its neutral initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.5 if "embed" in name else 1.2 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * noise if parameter.ndim > 1 else float("norm" in name) + 0.2 * noise)


# What the interpreter keeps between scenarios: engines are started once.


@cache
def engine_of(directory: Path, family: str) -> InProcessEngine:
    return InProcessEngine(directory / family / "A", max_model_len=64, max_num_seqs=8)


@cache
def weights_of(directory: Path, family: str, tag: str) -> dict[str, Tensor]:
    return load_file(directory / family / tag / "model.safetensors")


@cache
def fresh_completions(directory: Path, family: str, tag: str) -> list[Completion]:
    with InProcessEngine(directory / family / tag, max_model_len=64, max_num_seqs=8) as engine:
        return greedy(engine)


def digest_of(weights: Mapping[str, Tensor]) -> str:
    return combine({hf_name: digest(tensor) for hf_name, tensor in weights.items()})


def metadata_of(weights: dict[str, Tensor]) -> list[HFTensor]:
    return [HFTensor(hf_name, tensor.dtype, tuple(tensor.shape)) for hf_name, tensor in weights.items()]


def config_of(directory: Path, family: str) -> dict[str, Any]:
    import transformers

    return config_summary(transformers.AutoConfig.from_pretrained(directory / family / "A"))


def greedy(engine: Any) -> list[Completion]:
    return engine.generate(PROMPTS, temperature=0.0, max_tokens=12, ignore_eos=True)


def without_versions(completions: list[Completion]) -> list[tuple[list[int], list[float]]]:
    return [(completion.tokens, completion.logprobs) for completion in completions]


def parameters_of(engine: InProcessEngine) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in engine.receiver.model.named_parameters()}


def assert_serves(engine: Any, directory: Path, family: str, tag: str) -> None:
    """Greedy tokens and log-probs are exactly those of an engine started from that checkpoint."""
    assert without_versions(greedy(engine)) == without_versions(fresh_completions(directory, family, tag))


class Trainer:
    """A trainer of plain tensors, which syncs an engine as every trainer does: by `WeightSync`."""

    def __init__(self, engine: Any, directory: Path, family: str, **options: Any) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(directory / family / "A")
        self._bridge, self._model = plain_trainer(config, ParallelLayout(), 0, weights_of(directory, family, "A"))
        self._sync = WeightSync(self._bridge, self._model, engine, **options)

    def sync(self, weights: Mapping[str, Tensor], version: int) -> SyncReport:
        set_weights(self._bridge, self._model, 0, weights)
        return self._sync.sync(version)

    def request(self, version: int) -> UpdateRequest:
        """The request with which a sync begins."""
        wire, _ = self._sync._connection.transport.open(version, self._sync.route)
        return UpdateRequest(version, new_fill(), self._sync.route.fingerprint, self._sync.options.mode, wire, timeout=20.0)

    @property
    def parts(self) -> int:
        """How many parts one sync sends."""
        return sum(len(bucket.parts) for worker in self._sync.route.workers for bucket in worker.buckets)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._sync.close()


@contextmanager
def flipped_bit(number: int) -> Iterator[None]:
    """Of the parts that trainers send inside, number `number` leaves with another bit than it was packed with."""

    def flip(outlet: Any, worker: int, index: int, part: Any) -> None:
        outlet.place(worker, index, part)[part.nbytes // 2].bitwise_xor_(64)

    with _before_sending(number, flip):
        yield


@contextmanager
def failing_part(number: int) -> Iterator[None]:
    """The trainer fails before it sends part `number`."""

    def fail(*_: Any) -> None:
        raise ValueError("boom")

    with _before_sending(number, fail):
        yield


@contextmanager
def _before_sending(number: int, action: Callable[[Any, int, int, Any], None]) -> Iterator[None]:
    original = {kind: kind.send for kind in (SlotOutlet, RingOutlet)}
    sent = itertools.count()

    def acting(send: Callable[..., None]) -> Callable[..., None]:
        def act_and_send(outlet: Any, worker: int, index: int, part: Any) -> None:
            if next(sent) == number:
                action(outlet, worker, index, part)
            send(outlet, worker, index, part)

        return act_and_send

    for kind, send in original.items():
        kind.send = acting(send)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, send in original.items():
            kind.send = send  # type: ignore[method-assign]


@contextmanager
def left_open(engine: Any) -> Iterator[None]:
    """Nobody tells the engine that an update was given up, as where its trainer was killed."""
    engine.abort = lambda reason: None
    try:
        yield
    finally:
        del engine.abort
