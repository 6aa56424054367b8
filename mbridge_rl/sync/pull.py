"""Restores a trainer's model, under any layout, from the weights that engines hold: the same plans, with their sides swapped.

The source is images: those of a weight store, or those that live engines write on request. An image is a side of a plan like
any other: its pieces are segments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.digest import add, contiguous_strides, digest_strided, signed, unsigned
from mbridge_rl.core.errors import DigestMismatch, EngineMismatch, StoreError, listed
from mbridge_rl.core.model import ModelSpec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import Segment, Side
from mbridge_rl.distributed.arena import Arena
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.verify import differing, digests_of_model
from mbridge_rl.megatron.parameters import layout_of, live_side
from mbridge_rl.sync.payload import packing
from mbridge_rl.sync.payload.engine_side import boxes_of
from mbridge_rl.sync.payload.landing import Landing, ShapedView
from mbridge_rl.sync.payload.route import Piece, WorkerRoute
from mbridge_rl.sync.store.weight_store import WeightStore
from mbridge_rl.sync.trainer.joining import introduction_of

_log = logging.getLogger(__name__)


def restore_from_store(bridge: AutoBridge, model: Sequence[nn.Module], store: WeightStore) -> int:
    """Copies the live version of a store into a live model, and returns that version. All ranks call it together, on the
    store's host.

    Raises:
        StoreError: on all ranks: nothing was committed. EngineMismatch: the store holds another model. DigestMismatch: the
            images, or the weights of the restored model, are not what was committed.
    """
    group = RankGroup()
    with ExitStack() as readings:
        with group.fail_together():
            head = store.head()
            if head is None:
                raise StoreError(f"nothing was committed to the weight store {store.name!r} in {store.directory}")
            introduction = introduction_of(store, head)
            if introduction.model != bridge.spec.fingerprint:
                raise EngineMismatch(
                    f"the weight store {store.name!r} is of the model {introduction.model}, this bridge is of "
                    f"{bridge.spec.fingerprint}: give it the bridge of the checkpoint that the engine was started from"
                )
            routes = introduction.routes
            by_worker = {route.rank: readings.enter_context(store.read(route.rank, head.fill)) for route in routes}
            for route in routes if head.proofs is not None else ():
                packing.require_proof(route, by_worker[route.rank].image, head.version, head.proofs[route.rank])
        restore(bridge, model, routes, {rank: reading.image for rank, reading in by_worker.items()}, group)
        with group.fail_together():
            for reading in by_worker.values():
                reading.require_same()
    _log.info("restored version %d from the weight store %s", head.version, store.name)
    return head.version


@torch.no_grad()
def restore(
    bridge: AutoBridge,
    model: Sequence[nn.Module],
    routes: Sequence[WorkerRoute],
    images: Mapping[int, Tensor],
    group: RankGroup,
) -> None:
    """Copies the weights in `images` (uint8, by worker) into a live model and proves them. All ranks call it together.

    Raises:
        DigestMismatch: before the first write, if an image is damaged; after the last, if the model holds other weights.
    """
    spec: ModelSpec = bridge.spec
    with group.fail_together():
        layout = layout_of(model, spec)
        live, side = live_side(model, spec, layout, group.rank)
        plan = compile_plan(spec, image_side(spec, routes), side)
        for route in routes[group.rank :: group.size]:
            packing.require_expected(route, images[route.rank])
    with group.fail_together():
        tensors = _Typed(images)
        for name in plan.padded_names.get(group.rank, ()):
            live.stored(name).zero_()
        for copy in plan.copies:
            copy.target.of(live.stored(copy.target.name), copy.shape).copy_(
                copy.source.of(tensors[copy.source.name], copy.shape)
            )
    dtypes = {piece.hf_name: piece.dtype for route in routes for piece in route.pieces}
    dtype = max(dtypes.values(), key=lambda dtype: list(dtypes.values()).count(dtype))
    image_digests = _digests_of_images(spec, routes, images, spec.hf_dtypes(dtype), group)
    model_digests = digests_of_model(spec, model, bridge.export_plan(layout), layout, dtype, group)
    if wrong_names := differing(image_digests, model_digests):
        raise DigestMismatch(
            f"{len(wrong_names)} tensors of the restored model are not what the engine held: {listed(wrong_names)}"
        )


def image_side(spec: ModelSpec, routes: Sequence[WorkerRoute]) -> Side:
    """The images as a side of one rank, which can read all of them; local names are `<worker>:<dtype>`."""
    segments: list[Segment] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for hf_name, pieces in _pieces_by_name(routes).items():
        for worker, nbytes, piece in pieces:
            name = f"{worker}:{str(piece.dtype).removeprefix('torch.')}"
            shapes[name] = (nbytes // piece.dtype.itemsize,)
            source = ShapedView(piece.hf.offset, piece.shape, piece.hf.strides)
            target = ShapedView(piece.offset // piece.dtype.itemsize, piece.shape, contiguous_strides(piece.shape))
            segments += [
                Segment(hf_name, box, name, offset, strides, (0,))
                for box, offset, strides in boxes_of(Landing(hf_name, name, source, target), spec.hf_grid(hf_name))
            ]
    return Side(tuple(segments), shapes, dict.fromkeys(shapes, (0,)))


def _pieces_by_name(routes: Sequence[WorkerRoute]) -> dict[str, list[tuple[int, int, Piece]]]:
    """`(worker, bytes of its image, piece)` of the pieces that together hold every element once, by HF name."""
    by_name: dict[str, list[tuple[int, int, Piece]]] = {}
    for route in routes:
        for piece in route.pieces:
            if piece.counted:
                by_name.setdefault(piece.hf_name, []).append((route.rank, route.nbytes, piece))
    return by_name


class _Typed:
    """Images as flat tensors of a dtype, by `<worker>:<dtype>`."""

    def __init__(self, images: Mapping[int, Tensor]) -> None:
        self._images = images

    def __getitem__(self, name: str) -> Tensor:
        worker, dtype_name = name.split(":")
        dtype, image = getattr(torch, dtype_name), self._images[int(worker)]
        return image[: image.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _digests_of_images(
    spec: ModelSpec,
    routes: Sequence[WorkerRoute],
    images: Mapping[int, Tensor],
    dtypes: Mapping[str, torch.dtype],
    group: RankGroup,
) -> dict[str, int]:
    """The digest of every HF tensor in the images; the ranks share the work."""
    shares = dict.fromkeys(spec.hf_shapes, 0)
    for index, (hf_name, pieces) in enumerate(_pieces_by_name(routes).items()):
        for worker, _, piece in pieces if index % group.size == group.rank else ():
            values = packing.rectangle(piece, images[worker]).to(dtypes[hf_name])
            share = digest_strided(values, columns=piece.columns, offset=piece.hf.offset, strides=piece.hf.strides)
            shares[hf_name] = add(shares[hf_name], share)
    sums = group.sum(torch.tensor([signed(share) for share in shares.values()], dtype=torch.int64))
    return {hf_name: unsigned(value) for hf_name, value in zip(shares, sums.tolist(), strict=True)}


@contextmanager
def published(
    routes: Sequence[WorkerRoute], publish: Callable[[Sequence[str]], object], group: RankGroup
) -> Iterator[dict[int, Tensor]]:
    """The images that a live engine's workers write into shared memory, which exists only for this call: a worker that comes
    late has nothing to write to.

    Args:
        routes: the routes of the workers.
        publish: lets the workers write to the paths that it is given, one per worker.
        group: the trainer ranks; all call this together.
    """
    with ExitStack() as opened:

        def publish_to_arenas() -> list[Arena]:
            arenas = [opened.enter_context(Arena.create(route.nbytes)) for route in routes]
            publish([arena.path for arena in arenas])
            return arenas

        arenas = group.first_rank_does(publish_to_arenas)
        paths = group.share_plain([arena.path for arena in arenas or ()])
        with group.fail_together():
            arenas = arenas or [
                opened.enter_context(Arena.attach(path, route.nbytes)) for path, route in zip(paths, routes, strict=True)
            ]
        yield {route.rank: arena.view(0, (arena.nbytes,), torch.uint8) for route, arena in zip(routes, arenas, strict=True)}
