"""A model of vLLM's fused, padded and sharded parameters, with a loader that fills them as vLLM's do, on plain tensors.

What it shares with the library is nothing: it is written from vLLM's layouts, and serves as what a plan is measured by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.messages import WorkerDescription
from mbridge_rl.sync.worker.tracer import trace_load_weights

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.(gate|up|down)_proj\.weight$")
_FUSED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
    "q_a_proj": ("fused_qkv_a_proj", 0), "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1),
}  # fmt: skip
_ROW_PARALLEL = ("o_proj", "down_proj")
_COLUMN_PARALLEL = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "k_proj", "v_proj")
_PADDED_TO = 64


@dataclass(frozen=True)
class EngineLayout:
    tp: int = 1
    pp: int = 1
    expert_parallel: bool = False

    @property
    def size(self) -> int:
        return self.tp * self.pp


class FusedWorker(nn.Module):
    """One worker's parameters; their values are of no consequence until `load_weights`."""

    def __init__(
        self,
        config: Any,
        shapes: Mapping[str, tuple[int, ...]],
        layout: EngineLayout,
        rank: int,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.rank, self.hf_shapes = layout, rank, dict(shapes)
        self._tp, self._stage = rank % layout.tp, rank // layout.tp
        self._kv_heads = config.num_key_value_heads
        self._tied = config.tie_word_embeddings
        self._layers = config.num_hidden_layers
        self._experts = 1 + max((int(m[1]) for name in shapes if (m := _EXPERT.search(name))), default=-1)
        self._sizes: dict[str, dict[int, tuple[int, ...]]] = {}
        kept_as: dict[str, torch.dtype] = {}
        for name, shape in shapes.items():
            if not self._is_here(name):
                continue
            parameter_name, position = self._fused(name)
            self._sizes.setdefault(parameter_name, {})[position] = self._local_shape(name, shape)
            kept_as[parameter_name] = dtypes[name] if dtypes else torch.float32
        self._values = {}
        for name, parts in self._sizes.items():
            first = next(iter(parts.values()))
            shape = (sum(part[0] for part in parts.values()), *first[1:])
            if "experts.w" in name:
                shape = (len(self._local_experts()), (2 if "w13" in name else 1) * first[0], *first[1:])
            self._values[name] = nn.Parameter(torch.full(shape, -7.0).to(kept_as[name]), requires_grad=False)
            self.register_parameter(name.replace(".", "/"), self._values[name])

    def parameters_by_name(self) -> dict[str, Tensor]:
        return {name.replace("/", "."): parameter.data for name, parameter in self.named_parameters()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if not self._is_here(name):
                continue
            parameter_name, position = self._fused(name)
            parameter = self._values[parameter_name].data
            if match := _EXPERT.search(name):
                self._load_expert(parameter, int(match[1]), match[2], tensor)
            elif parameter_name in ("model.embed_tokens.weight", "lm_head.weight"):
                self._load_vocabulary(parameter, tensor)
            else:
                start = sum(size[0] for other, size in self._sizes[parameter_name].items() if other < position)
                shard = self._shard(name, tensor)
                parameter.narrow(0, start, shard.shape[0]).copy_(shard)

    def describe(self, metadata: list[HFTensor]) -> WorkerDescription:
        trace = trace_load_weights(self, metadata, torch.device("cpu"))
        assert not trace.untraceable
        assert not trace.rejected
        named = {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}
        return WorkerDescription(
            self.rank,
            self.layout.size,
            "here",
            {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in named.items()},
            {
                hf_name: tuple(
                    type(part)(hf_name, part.parameter_name.replace("/", "."), part.source, part.target) for part in parts
                )
                for hf_name, parts in trace.landings.items()
            },
            {},
        )

    def _is_here(self, name: str) -> bool:
        last = self.layout.pp - 1
        if match := _LAYER.match(name):
            if int(match[1]) * self.layout.pp // self._layers != self._stage:
                return False
            expert = _EXPERT.search(name)
            return expert is None or int(expert[1]) in self._local_experts()
        if name == "model.embed_tokens.weight":
            return self._stage == 0 or (self._tied and self._stage == last)
        return self._stage == last

    def _local_experts(self) -> range:
        if not self.layout.expert_parallel:
            return range(self._experts)
        each = self._experts // self.layout.tp
        return range(self._tp * each, (self._tp + 1) * each)

    def _fused(self, name: str) -> tuple[str, int]:
        if match := _EXPERT.search(name):
            return name[: match.start()] + ("experts.w2" if match[2] == "down" else "experts.w13"), 0
        module = name.split(".")[-2]
        fused, position = _FUSED.get(module, (module, 0))
        return name.replace(f".{module}.", f".{fused}."), position

    def _tp_of_experts(self) -> int:
        return 1 if self.layout.expert_parallel else self.layout.tp

    def _local_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return (-(-shape[0] // (_PADDED_TO * self.layout.tp)) * _PADDED_TO, *shape[1:])
        if match := _EXPERT.search(name):
            tp = self._tp_of_experts()
            return (shape[0], shape[1] // tp) if match[2] == "down" else (shape[0] // tp, shape[1])
        return tuple(self._shard(name, torch.empty(shape, device="meta")).shape)

    def _shard(self, name: str, tensor: Tensor) -> Tensor:
        module, tp, rank = name.split(".")[-2], self.layout.tp, self._tp
        if module in ("k_proj", "v_proj") and tp > self._kv_heads:
            tp, rank = self._kv_heads, rank * self._kv_heads // tp
        if module in _ROW_PARALLEL and tensor.dim() == 2:
            return tensor.chunk(tp, 1)[rank]
        if module in _COLUMN_PARALLEL:
            size = tensor.shape[0] // tp
            return tensor.narrow(0, rank * size, size)
        return tensor

    def _load_vocabulary(self, parameter: Tensor, tensor: Tensor) -> None:
        first = self._tp * parameter.shape[0]
        count = max(0, min(parameter.shape[0], tensor.shape[0] - first))
        if count:
            parameter[:count].copy_(tensor[first : first + count])
        parameter[count:].fill_(0)

    def _load_expert(self, parameter: Tensor, expert: int, kind: str, tensor: Tensor) -> None:
        tp = self._tp_of_experts()
        rank = self._tp % tp
        mine = parameter[expert - self._local_experts().start]
        if kind == "down":
            mine.copy_(tensor.chunk(tp, 1)[rank])
        else:
            half = mine.shape[0] // 2
            mine.narrow(0, half * (kind == "up"), half).copy_(tensor.chunk(tp, 0)[rank])
