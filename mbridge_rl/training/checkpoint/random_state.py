"""All random states that a trainer rank draws from, as plain data."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.lora.dropout import seed_dropout
from mbridge_rl.megatron.parallel import seed_random_states

_LARGEST_SEED = 1 << 31  # NumPy takes seeds up to 2^32; Megatron adds its own offsets to this one


def random_state() -> dict[str, Any]:
    """The random states of Python, NumPy, torch on the CPU and the GPU, and Megatron's named states (dropout inside tensor
    parallelism)."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    kind, words, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(words.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "megatron": dict(get_cuda_rng_tracker().get_states()),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Sets all random states to what `random_state` returned."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def derive_random_state(seed: int, step: int, layout: ParallelLayout) -> None:
    """Sets random states that follow from the saved run's `seed` and `step` alone.

    Ranks need them when they cannot use the saved states, since those belong to ranks of another layout. A run that is
    continued twice then draws the same numbers both times, and none that it drew before.
    """
    key = f"mbridge_rl:{seed}:{step}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % _LARGEST_SEED
    rank = dist.get_rank()
    random.seed(number)
    np.random.seed(number)
    seed_random_states(number)
    seed_dropout(number, rank, layout.coordinates(rank))
