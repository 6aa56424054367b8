"""Megatron's options for the distribution of layers over pipeline stages, all turned into numbers of layers per virtual stage.

Virtual stage `s` is chunk `s // pp` of pipeline rank `s % pp`, so that the numbers in model order are complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mbridge_rl.core.errors import LayoutError

# The kinds of layers: Megatron's letters in layout strings, and names in lists.
_KIND_OF_LETTER = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
_REPEATED_GROUP = re.compile(r"\(([^()]+)\)\*(\d+)")
_REPEATED_LETTER = re.compile(r"(.)\*(\d+)")

Layout = str | Sequence[Sequence[object]]


def counted_stages(pipeline_layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Decoder layers and multi-token prediction layers of each virtual stage, from a `pipeline_model_parallel_layout`.

    Args:
        pipeline_layout: a string such as `Et*3|(tt|)*29,m|L` (stages end at `|`, `*` repeats a letter or a group, groups may
            nest, commas have no meaning), or a list of stages, each a list of `embedding`, `decoder`, `mtp`, `loss`.

    Raises:
        LayoutError: the layout does not parse, does not begin with the only embedding and end with the only loss, or has a
            decoder layer after a multi-token prediction layer.
    """
    stages = _parsed(pipeline_layout) if isinstance(pipeline_layout, str) else [_kinds(stage) for stage in pipeline_layout]
    flat = [kind for stage in stages for kind in stage]
    if flat[:1] != ["embedding"] or flat[-1:] != ["loss"] or flat.count("embedding") + flat.count("loss") != 2:
        raise LayoutError(
            f"pipeline layout {pipeline_layout!r} must begin with the embedding (E) and end with the loss (L), each once"
        )
    if "mtp" in flat and "decoder" in flat[flat.index("mtp") :]:
        raise LayoutError(f"pipeline layout {pipeline_layout!r} has decoder layers (t) after a prediction layer (m)")
    return tuple(stage.count("decoder") for stage in stages), tuple(stage.count("mtp") for stage in stages)


def _parsed(text: str) -> list[list[str]]:
    plain = text.replace(",", "")
    while (unrolled := _unrolled(_REPEATED_GROUP, plain)) != plain:
        plain = unrolled
    plain = _unrolled(_REPEATED_LETTER, plain)
    if unknown := sorted(set(plain) - _KIND_OF_LETTER.keys() - {"|"}):
        raise LayoutError(
            f"pipeline layout {text!r} does not parse at {''.join(unknown)!r}: write E (embedding), t (decoder layer), "
            "m (multi-token prediction layer), L (loss), | between stages, and x*3 or (xy|)*3 for repeats, as in "
            "Et*3|(tt|)*29,m|L"
        )
    return [[_KIND_OF_LETTER[letter] for letter in stage] for stage in plain.split("|")]


def _unrolled(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda repeat: repeat[1] * int(repeat[2]), text)


def _kinds(stage: Sequence[object]) -> list[str]:
    """The kinds of a stage's layers, given as names or as members of Megatron's `LayerType`."""
    kinds = [str(getattr(kind, "name", kind)).strip().lower() for kind in stage]
    if unknown := sorted(set(kinds) - set(_KIND_OF_LETTER.values())):
        raise LayoutError(f"pipeline layout names {', '.join(unknown)}; known are {', '.join(_KIND_OF_LETTER.values())}")
    return kinds


def dealt_layers(
    num_layers: int,
    pp: int,
    vpp: int,
    *,
    first: int | None = None,
    last: int | None = None,
    embedding_as_layer: bool = False,
    loss_as_layer: bool = False,
) -> tuple[int, ...]:
    """Decoder layers of each of the `pp * vpp` virtual stages by Megatron's arithmetic.

    Args:
        first, last: layers of the first and of the last pipeline rank; the ranks between share the rest evenly.
        embedding_as_layer, loss_as_layer: whether the embedding (loss) counts as a layer, so that its stage has one decoder
            layer less.

    Raises:
        LayoutError: the layers cannot be divided evenly among the pipeline ranks or their virtual stages.
    """
    per_rank: list[int | None] = [None] * pp
    if first is not None:
        per_rank[0] = first
    if last is not None:
        per_rank[-1] = last
    open_ranks = per_rank.count(None)
    rest = num_layers + embedding_as_layer + loss_as_layer - sum(filter(None, per_rank))
    if (rest <= 0 or rest % open_ranks) if open_ranks else rest:
        raise LayoutError(f"{rest} layers are left for {open_ranks} pipeline ranks, which have to share them evenly")
    share = rest // open_ranks if open_ranks else 0
    counts = [share if count is None else count for count in per_rank]
    if uneven := [count for count in counts if count % vpp]:
        raise LayoutError(f"the {uneven[0]} layers of a pipeline rank do not divide by vpp={vpp} virtual stages")
    stages = [count // vpp for _ in range(vpp) for count in counts]
    stages[0] -= embedding_as_layer
    stages[-1] -= loss_as_layer
    if min(stages) < 0:
        raise LayoutError("a stage has no room for the embedding or the loss as a layer: there are more stages than layers")
    return tuple(stages)
