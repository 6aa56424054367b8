"""The Mamba-2 mixers (arXiv 2405.21060) of Nemotron-H and Falcon-H1."""

from __future__ import annotations

from dataclasses import dataclass

from mbridge_rl.bridges.blocks.decoder import Block
from mbridge_rl.core.rules import Rule, column_parallel, row_parallel, stacked


@dataclass(frozen=True)
class MambaSizes:
    """The sizes of a mixer. `heads * head_dim` is the inner size; each group has one B and one C of size `state`; the
    convolution has `width` inputs."""

    heads: int
    head_dim: int
    groups: int
    state: int
    width: int

    @property
    def convolved(self) -> dict[str, int]:
        """The number of channels of each part of the convolution, in their order."""
        inner, shared = self.heads * self.head_dim, self.groups * self.state
        return {"x": inner, "B": shared, "C": shared}

    @property
    def projected(self) -> dict[str, int]:
        """The number of rows of each part of the input projection, in their order: the gate, the convolved parts, the time
        step."""
        return {"z": self.convolved["x"], **self.convolved, "dt": self.heads}


def mamba(hidden: int, sizes: MambaSizes, megatron_prefix: str, hf_prefix: str) -> Block:
    """The mixer without its norms. The parts of the input projection are sharded separately: each rank has its heads and groups
    of every part. Megatron's convolution has width 4 and a bias."""
    inner = sizes.convolved["x"]
    rules = (
        _rows(f"{megatron_prefix}.in_proj.weight", f"{hf_prefix}.in_proj.weight", sizes.projected, (hidden,)),
        _rows(f"{megatron_prefix}.conv1d.weight", f"{hf_prefix}.conv1d.weight", sizes.convolved, (1, sizes.width)),
        _rows(f"{megatron_prefix}.conv1d.bias", f"{hf_prefix}.conv1d.bias", sizes.convolved),
        *(
            column_parallel(f"{megatron_prefix}.{name}", {f"{hf_prefix}.{name}": sizes.heads})
            for name in ("dt_bias", "A_log", "D")
        ),
        row_parallel(f"{megatron_prefix}.out_proj.weight", f"{hf_prefix}.out_proj.weight", (hidden, inner)),
    )
    config = {
        "mamba_num_heads": sizes.heads,
        "mamba_head_dim": sizes.head_dim,
        "mamba_num_groups": sizes.groups,
        "mamba_state_dim": sizes.state,
    }
    return Block(config, rules)


def _rows(megatron_name: str, hf_name: str, sizes: dict[str, int], inner: tuple[int, ...] = ()) -> Rule:
    """A rule for one HF tensor whose parts are sharded separately."""
    return Rule(megatron_name, stacked(hf_name, tuple(sizes.values()), inner), (0, *inner), axis="tp")
