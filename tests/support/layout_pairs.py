"""Random (trainer layout, engine layout) pairs: planned, moved through packed images on virtual ranks, compared bit by bit.

python tests/support/layout_pairs.py 10000        # all of them, some minutes
"""

from __future__ import annotations

import random
import sys
import time
from math import prod
from typing import Any

import torch
from fused_engine import EngineLayout, FusedWorker
from torch import Tensor

from mbridge_rl.bridges import model_spec
from mbridge_rl.core import virtual
from mbridge_rl.core.digest import add, digest
from mbridge_rl.core.errors import LayoutError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.model import HFTensor, ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import Side, hf_side, megatron_side
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.engine_side import engine_side, local_dtypes
from mbridge_rl.sync.payload.message_codec import decode, encode
from mbridge_rl.sync.payload.route import Route, WorkerRoute, fingerprint_of, plan_route
from mbridge_rl.sync.trainer.packer import Packer

_ENGINES_PER_MODEL = 5
_TRAINERS_PER_ENGINE = 20
_BATCH = 1000
_DIGESTS_EVERY = 10  # pairs: digests cost ten times the rest on tensors of a few bytes


def run_pairs(count: int, seed: int = 0) -> int:
    """Plans and runs `count` pairs; raises at the first that is not exact. Returns how many different pairs of layouts."""
    draw, done, different = random.Random(seed), 0, set()
    while done < count:
        case = _Case(draw)
        for _ in range(_ENGINES_PER_MODEL):
            engine = _Engine(case, _engine_layout(draw, case))
            for _ in range(_TRAINERS_PER_ENGINE):
                layout = _trainer_layout(draw, case.spec)
                engine.check(layout, draw.choice([1 << 11, 1 << 13, 1 << 16]), digests=done % _DIGESTS_EVERY == 0)
                different.add((layout, engine.layout, case.config.architectures[0]))
                done += 1
                if done == count:
                    return len(different)
    return len(different)


class _Case:
    """A model of random sizes and its weights, every element another number."""

    def __init__(self, draw: random.Random) -> None:
        self.config = _config(draw)
        self.spec: ModelSpec = model_spec(self.config)
        self.state: dict[str, Tensor] = {}
        first = 1
        for hf_name, shape in self.spec.hf_shapes.items():
            self.state[hf_name] = torch.arange(first, first + prod(shape), dtype=torch.float32).view(shape)
            first += prod(shape)
        self.metadata = [HFTensor(name, torch.float32, shape) for name, shape in self.spec.hf_shapes.items()]
        self.dtypes = dict.fromkeys(self.state, torch.float32)
        self._shards: dict[ParallelLayout, tuple[Side, dict[int, dict[str, Tensor]]]] = {}

    def shards(self, layout: ParallelLayout) -> tuple[Side, dict[int, dict[str, Tensor]]]:
        if layout not in self._shards:
            side = megatron_side(self.spec, layout)
            ranks = {rank: virtual.allocate(side.on(rank), self.dtypes) for rank in side.ranks}
            virtual.run(compile_plan(self.spec, hf_side(self.spec), side), {0: self.state}, ranks)
            self._shards[layout] = side, ranks
        return self._shards[layout]


class _Engine:
    def __init__(self, case: _Case, layout: EngineLayout) -> None:
        self.case, self.layout = case, layout
        self.workers = [FusedWorker(case.config, case.spec.hf_shapes, layout, rank) for rank in range(layout.size)]
        self.descriptions = decode(encode([worker.describe(case.metadata) for worker in self.workers]))
        self.side = engine_side(case.spec, self.descriptions, case.dtypes)
        self.expected: list[dict[str, Tensor]] = []
        for worker in self.workers:
            worker.load_weights(case.state.items())
            self.expected.append({name: tensor.clone() for name, tensor in worker.parameters_by_name().items()})

    def check(self, layout: ParallelLayout, bucket_bytes: int, digests: bool) -> None:
        case = self.case
        source, ranks = case.shards(layout)
        plan = compile_plan(case.spec, source, self.side)
        dtypes = local_dtypes(self.descriptions, case.dtypes)
        route = plan_route(plan, range(self.layout.size), dtypes, bucket_bytes)
        images, counted = _packed(route, ranks, digests)
        for hf_name in {piece.hf_name for worker in route.workers for piece in worker.pieces}:
            assert not digests or counted[hf_name] == digest(case.state[hf_name]), hf_name
        for sent_route, worker, expected in zip(route.workers, self.workers, self.expected, strict=True):
            message = sent_route.to_json()
            received_route = WorkerRoute.from_json(message)
            _load_and_compare(received_route, images[sent_route.rank], worker, expected, digests)
            assert not digests or fingerprint_of([sent_route]) == fingerprint_of([received_route])


def _packed(route: Route, ranks: dict[int, dict[str, Tensor]], with_digests: bool) -> tuple[dict[int, Tensor], dict[str, int]]:
    images = {worker.rank: torch.full((worker.nbytes,), 0xAB, dtype=torch.uint8) for worker in route.workers}
    counted: dict[str, int] = {}
    for rank, tensors in ranks.items():
        dtypes = {piece.hf_name: piece.dtype for worker in route.workers for piece in worker.pieces}
        packer = Packer(route, rank, tensors, dtypes)
        assert not packer.examine(with_digests=with_digests, check_finite=True)
        for worker, _, part in route.parts_of(rank):
            into = images[worker.rank][part.start : part.start + part.nbytes]
            packer.pack(worker, part, into)
            for piece in part.pieces:
                assert piece.offset % 64 == 0
                if piece.counted and with_digests:
                    share = packing.examine(piece, packing.rectangle(piece, into, part.start), with_digest=True)
                    counted[piece.hf_name] = add(counted.get(piece.hf_name, 0), share)
    return images, counted


def _load_and_compare(
    worker: WorkerRoute, image: Tensor, engine: FusedWorker, expected: dict[str, Tensor], digests: bool
) -> None:
    parameters = engine.parameters_by_name()
    for name, tensor in parameters.items():
        tensor.copy_(torch.where(expected[name] == 0, 0.0, torch.nan))  # zeros are padding, which no plan moves
    for piece in worker.pieces:
        packing.placed(piece.target, piece.shape, parameters).copy_(packing.rectangle(piece, image))
    assert parameters.keys() == expected.keys()
    for name, tensor in parameters.items():
        assert torch.equal(tensor, expected[name]), name
    if not digests:
        return
    trainers = packing.expected_digests(worker, image)
    assert packing.image_digests(worker, image) == trainers
    assert packing.live_digests(worker.pieces, parameters) == trainers


def _config(draw: random.Random) -> Any:
    import transformers

    heads, groups = draw.choice([(4, 2), (8, 4), (8, 2), (4, 1), (8, 8), (6, 2)])
    family = draw.choice(["Llama", "Qwen2", "Qwen3", "Qwen3Moe", "DeepseekV3"])
    fields: dict[str, Any] = dict(
        vocab_size=draw.randint(70, 140), hidden_size=heads * draw.randint(2, 4), intermediate_size=8 * draw.randint(1, 3),
        num_hidden_layers=draw.randint(1, 2), num_attention_heads=heads, num_key_value_heads=groups,
        max_position_embeddings=64, tie_word_embeddings=draw.random() < 0.4, eos_token_id=None,
    )  # fmt: skip
    if family != "DeepseekV3":
        fields["head_dim"] = draw.choice([2, 4, 6])
    if family == "Qwen3Moe":
        fields |= dict(moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, mlp_only_layers=draw.choice([[], [0]]))
    if family == "DeepseekV3":
        fields |= dict(
            num_key_value_heads=heads, moe_intermediate_size=8, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=3,
            qk_rope_head_dim=4, v_head_dim=3, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
            first_k_dense_replace=1, n_group=2, topk_group=1, num_nextn_predict_layers=0, tie_word_embeddings=False,
        )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**fields)
    config.architectures = [f"{family}ForCausalLM"]
    return config


def _engine_layout(draw: random.Random, case: _Case) -> EngineLayout:
    heads = case.config.num_attention_heads
    tp = draw.choice([size for size in (1, 2, 4) if heads % size == 0])
    experts = case.spec.num_experts is not None and draw.random() < 0.5
    return EngineLayout(tp, draw.choice([1, 2]), experts)


def _trainer_layout(draw: random.Random, spec: ModelSpec) -> ParallelLayout:
    while True:
        sizes = {axis: draw.choice([1, 1, 2, 4]) for axis in ("tp", "ep", "etp")}
        if not spec.num_experts:
            sizes |= {"ep": 1, "etp": 1}
        pp = draw.choice([1, 2])
        stages = pp * (vpp := draw.choice([1, 2]) if pp > 1 else 1)
        cuts = sorted(draw.randint(0, spec.num_layers) for _ in range(stages - 1))
        stage_layers = tuple(stop - first for first, stop in zip([0, *cuts], [*cuts, spec.num_layers], strict=True))
        dp = max(1, sizes["ep"] * sizes["etp"] // sizes["tp"]) * draw.choice([1, 1, 2])
        try:
            layout = ParallelLayout(
                **sizes, pp=pp, vpp=vpp, dp=dp, stage_layers=stage_layers, vocab_multiple=draw.choice([1, 8])
            )
            spec.validate(layout)
        except LayoutError:
            continue
        return layout


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    started = time.perf_counter()
    for seed, first in enumerate(range(0, wanted, _BATCH)):
        size = min(_BATCH, wanted - first)
        unlike = run_pairs(size, seed)
        seconds = time.perf_counter() - started
        print(f"{first + size} of {wanted} pairs bit-exact ({unlike} of the last {size} unlike), {seconds:.0f} s", flush=True)
