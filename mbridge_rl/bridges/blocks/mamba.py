"""Mamba-2 mixers (arXiv 2405.21060), as Nemotron-H's and Falcon-H1's layers have them."""

from __future__ import annotations

from dataclasses import dataclass

from mbridge_rl.bridges.blocks.decoder import Block
from mbridge_rl.core.rules import Rule, column_parallel, row_parallel, stacked


@dataclass(frozen=True)
class MambaSizes:
    """`heads * head_dim` is the inner size; each group has one B and one C of `state`; the convolution sees `width` inputs."""

    heads: int
    head_dim: int
    groups: int
    state: int
    width: int

    @property
    def convolved(self) -> dict[str, int]:
        """Channels of the convolution, in their order."""
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        return {"x": inner, "B": shared, "C": shared}

    @property
    def projected(self) -> dict[str, int]:
        """Rows of the input projection, in their order: the gate, what is convolved, the time step."""
        return {"z": self.convolved["x"], **self.convolved, "dt": self.heads}


def mamba(hidden: int, sizes: MambaSizes, ours: str, theirs: str) -> Block:
    """The mixer without its norms. Rows of the input projection are cut one by one: each rank has its heads and groups of every
    one of them. Megatron's convolution is of width 4 and biased."""
    inner = sizes.convolved["x"]
    rules = (
        _rows(f"{ours}.in_proj.weight", f"{theirs}.in_proj.weight", sizes.projected, (hidden,)),
        _rows(f"{ours}.conv1d.weight", f"{theirs}.conv1d.weight", sizes.convolved, (1, sizes.width)),
        _rows(f"{ours}.conv1d.bias", f"{theirs}.conv1d.bias", sizes.convolved),
        *(column_parallel(f"{ours}.{name}", {f"{theirs}.{name}": sizes.heads}) for name in ("dt_bias", "A_log", "D")),
        row_parallel(f"{ours}.out_proj.weight", f"{theirs}.out_proj.weight", (hidden, inner)),
    )
    config = {
        "mamba_num_heads": sizes.heads,
        "mamba_head_dim": sizes.head_dim,
        "mamba_num_groups": sizes.groups,
        "mamba_state_dim": sizes.state,
    }
    return Block(config, rules)


def _rows(megatron_name: str, hf_name: str, sizes: dict[str, int], inner: tuple[int, ...] = ()) -> Rule:
    """Rows of one HF tensor that are cut separately."""
    return Rule(megatron_name, stacked(hf_name, tuple(sizes.values()), inner), (0, *inner), axis="tp")
