"""Dropout of adapters' inputs: ranks that hold the same elements drop the same ones, all others draw independently.

The random states are entries of Megatron's RNG tracker, so that recomputed layers draw the same numbers again, and checkpoints
contain the states.
"""

from __future__ import annotations

import hashlib

import torch.nn.functional as F
from torch import Tensor

from mbridge_rl.core.layout import Coordinates
from mbridge_rl.megatron.cpu.runtime import megatron_runtime

_OWN, _TENSOR_RANKS, _EXPERT_TENSOR_RANKS = "adapter-dropout", "adapter-dropout-tp", "adapter-dropout-etp"


def seed_dropout(seed: int, rank: int, at: Coordinates) -> None:
    """Adds this rank's random states to the tracker, or replaces them.

    Args:
        at: the rank's coordinates.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    shared_by = {
        _OWN: (rank,),
        _TENSOR_RANKS: (at.pp, at.dp, at.cp),
        _EXPERT_TENSOR_RANKS: (at.pp, at.ep, _expert_replica()),
    }
    tracker = get_cuda_rng_tracker()
    for name, key in shared_by.items():
        number = int.from_bytes(hashlib.blake2b(f"{seed}:{name}:{key}".encode(), digest_size=6).digest(), "big")
        tracker.states_.pop(name, None)
        tracker.seeds_.discard(number)
        with megatron_runtime():
            tracker.add(name, number)


def drop(x: Tensor, probability: float, mode: str, *, sequence_parallel: bool) -> Tensor:
    """`x` with elements set to zero with this probability and the others scaled up.

    Args:
        mode: the linear's mode (`lora.layers.Mode`). Together with `sequence_parallel` it determines which ranks hold the same
            elements: the tensor-parallel ranks of a column-parallel or replicated linear, unless each has its own part of the
            sequence, and the ranks that shard an expert's output.
    """
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    name = _OWN
    if mode == "expert_column":
        name = _EXPERT_TENSOR_RANKS
    elif mode in ("column", "replicated") and not sequence_parallel:
        name = _TENSOR_RANKS
    with get_cuda_rng_tracker().fork(name):
        return F.dropout(x, probability)


def _expert_replica() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_expert_data_parallel_rank()
