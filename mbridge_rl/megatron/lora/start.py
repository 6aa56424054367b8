"""The initial factors of adapters, which are equal on every parallel layout: random numbers are drawn for the full tensor,
seeded by its global name, and decompositions are of the full weight."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mbridge_rl.core.adapter_targets import adapted_parts
from mbridge_rl.core.adapters import FusedRows
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.core.rules import Rule
from mbridge_rl.core.segments import pieces
from mbridge_rl.megatron.lora.layers import Mode, cutting_group
from mbridge_rl.megatron.parameters import world_rank


@dataclass(frozen=True)
class Start:
    """Computes the initial factors of one linear's adapters.

    Attributes:
        rule: the rule of the weight.
        rows: the division of this rank's rows into adapters.
    """

    config: LoRAConfig
    rule: Rule
    rows: FusedRows
    mode: Mode
    layout: ParallelLayout

    def factors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """This rank's factors of `weight [out, in]` (local), fp32, on its device. All ranks that shard it call this together.

        Args:
            name: the weight's global name.
        """
        match self.config.start:
            case "pissa" | "olora":
                factor_a, factor_b = self._decomposed(name, weight.detach())
            case "orthogonal":
                factor_a, factor_b = self._orthogonal(name)
            case _:
                factor_a, factor_b = self._random(name), torch.zeros(self.rows.adapted_rows, self.config.rank)
        factors = {"lora_a": factor_a, "lora_b": factor_b}
        if self.config.keeps_start:
            factors |= {"lora_start_a": factor_a.clone(), "lora_start_b": -factor_b}
        return {factor: value.to(weight.device) for factor, value in factors.items()}

    @property
    def _adapters(self) -> int:
        """The number of `A` that are stacked one below the other."""
        parts = adapted_parts(self.rule, self.config.targets)
        return len({part.hf_name for part in parts}) if self.config.canonical else 1

    @property
    def _columns(self) -> int:
        """The number of columns of the full weight."""
        return self.rule.extent if self.rule.dim == 1 else self.rule.shape[1]

    def _random(self, name: str) -> Tensor:
        """A random `A`: Kaiming-uniform with a = sqrt(5), or normal with a standard deviation of 1 / rank, as in PEFT."""
        generator, shape = self._generator(name), (self._adapters * self.config.rank, self._columns)
        if self.config.start == "gaussian":
            return self._cut_columns(torch.randn(shape, generator=generator) / self.config.rank)
        bound = 1 / math.sqrt(self._columns)
        return self._cut_columns(torch.rand(shape, generator=generator) * (2 * bound) - bound)

    def _orthogonal(self, name: str) -> tuple[Tensor, Tensor]:
        """`A` and `B`, made as in PEFT from alternating rows of a random orthogonal matrix, so that `B A` is zero."""
        generator, half = self._generator(name), self.config.rank // 2
        rows_b, factors_a = [], []
        for _ in range(self._adapters):
            orthogonal, _ = torch.linalg.qr(torch.randn(self.config.rank, self.config.rank, generator=generator))
            rows_b.append(orthogonal[1::2])
            factors_a.append((torch.randn(self._columns, half, generator=generator) @ orthogonal[0::2]).t() / 10)
        scores = torch.cat(self._rows_of_this_rank(name, half))
        numbers = self.rows.adapter_numbers()
        numbers = numbers[numbers >= 0]
        factor_b = torch.stack(rows_b)[numbers]  # [rows, rank / 2, rank]
        return self._cut_columns(torch.cat(factors_a)), torch.einsum("oh,ohr->or", scores, factor_b) / 10

    def _rows_of_this_rank(self, name: str, width: int) -> list[Tensor]:
        """Random rows `[rows, width]` of every adapted piece of this rank; they are drawn for each full part."""
        adapted = adapted_parts(self.rule, self.config.targets)
        if self.rule.dim == 1:
            return [torch.randn(self.rows.adapted_rows, width, generator=self._generator(f"{name}:0"))]
        shards, shard = self._shard()
        rows_of_part = {
            index: torch.randn(part.size(0), width, generator=self._generator(f"{name}:{index}"))
            for index, part in enumerate(self.rule.parts)
            if part in adapted
        }
        return [
            rows_of_part[index][first : first + size]
            for index, first, size, _ in pieces(self.rule, shards, shard, self.rule.extent // shards)
            if index in rows_of_part
        ]

    def _decomposed(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """PiSSA's factors (arXiv 2404.02948): the largest singular triples; OLoRA's (arXiv 2406.01775): the first columns and
        rows of `Q R`."""
        full_weight, numbers = self._gathered(weight)
        rank = self.config.rank
        factors_a, factor_b = [], torch.empty(len(numbers), rank)
        for number in range(self._adapters):
            adapter_weight = full_weight[numbers == number]
            if rank > min(adapter_weight.shape):
                shape = list(adapter_weight.shape)
                raise ValueError(f"{name} {shape} has fewer than {rank} components for {self.config.start}: lower the rank")
            if self.config.start == "pissa":
                left, values, right = torch.linalg.svd(adapter_weight, full_matrices=False)
                root = (values[:rank] / self.config.scale).sqrt()
                begin_a, begin_b = root[:, None] * right[:rank], left[:, :rank] * root
            else:
                orthogonal, triangle = torch.linalg.qr(adapter_weight)
                begin_a, begin_b = triangle[:rank], orthogonal[:, :rank]
            factors_a.append(begin_a)
            factor_b[numbers == number] = begin_b
        return self._cut_columns(torch.cat(factors_a)), self._rows_of(factor_b, numbers)

    def _gathered(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The full weight in fp32 on the host, in rank order, and the number of each row's adapter."""
        numbers, group = self.rows.adapter_numbers(), cutting_group(self.mode)
        if group is None:
            return weight.float().cpu(), numbers
        weights = [torch.empty_like(weight) for _ in range(group.size())]
        torch.distributed.all_gather(weights, weight.contiguous(), group=group)
        full_weight = torch.cat([part.float().cpu() for part in weights], dim=self.rule.dim)
        if self.rule.dim == 1:
            return full_weight, numbers
        own_numbers = numbers.to(weight.device)
        numbers_of_ranks = [torch.empty_like(own_numbers) for _ in range(group.size())]
        torch.distributed.all_gather(numbers_of_ranks, own_numbers, group=group)
        return full_weight, torch.cat(numbers_of_ranks).cpu()

    def _rows_of(self, factor_b: Tensor, numbers: Tensor) -> Tensor:
        """This rank's adapted rows of a full `B`."""
        if self.rule.dim == 0:
            shards, shard = self._shard()
            factor_b, numbers = factor_b.chunk(shards)[shard], numbers.chunk(shards)[shard]
        return factor_b[numbers >= 0].contiguous()

    def _cut_columns(self, factor_a: Tensor) -> Tensor:
        """This rank's columns of a full `A`."""
        if self.rule.dim == 0:
            return factor_a
        shards, shard = self._shard()
        return factor_a.chunk(shards, dim=1)[shard].contiguous()

    def _shard(self) -> tuple[int, int]:
        return self.rule.axis_size(self.layout), self.rule.axis_rank(self.layout.coordinates(world_rank()))

    def _generator(self, name: str) -> torch.Generator:
        seed = hashlib.blake2b(f"{self.config.seed}:{name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed, "big"))
