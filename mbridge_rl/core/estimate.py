"""Estimates the costs of a refit from its plan alone: bytes, balance, messages, staging memory and time, without weights or
devices.

The estimate is for this schedule: layers are sent in checkpoint order and, inside of a layer, tensors in the order in which
their senders become free, so that experts of many ranks are sent in parallel. Consecutive tensors form a bucket, as many as fit
without any rank sending or receiving more than `bucket_bytes` of it (a tensor that does not fit is cut evenly). All that one
rank sends to another in a bucket is one message. Two buckets are staged: one is sent while the other is packed or consumed.

Engines relay buckets: bucket `b` enters at replica `b % replicas`, and every replica forwards it to the next while receiving
it. So trainers send each byte once, whatever the number of replicas, and no replica receives a byte twice.

The lower bound of the time is the time in which the busiest link transfers its bytes. The prediction sends one bucket after the
other, each in the time that the bytes and messages of its busiest rank take, and adds the relay of the last bucket through the
replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mbridge_rl.core.templates import Flows


@dataclass(frozen=True)
class Links:
    """A rank's network: bytes per second in each of both directions, and the latency of a message in seconds."""

    trainer_bandwidth: float = 50e9
    rollout_bandwidth: float = 50e9
    message_seconds: float = 10e-6


@dataclass(frozen=True)
class Spread:
    """The distribution of a number of bytes over the ranks of one side."""

    minimum: int
    mean: float
    maximum: int
    total: int

    @property
    def balance(self) -> float:
        """The maximum divided by the mean: 1 where all ranks have the same number."""
        return self.maximum / self.mean if self.mean else 1.0

    @staticmethod
    def of(values: np.ndarray) -> Spread:
        return Spread(int(values.min()), float(values.mean()), int(values.max()), int(values.sum()))


@dataclass(frozen=True)
class Estimate:
    """The costs of one refit, in bytes and seconds.

    Attributes:
        sent: bytes that each trainer rank sends.
        received: bytes that each rollout rank receives, from trainers and replicas.
        entered: bytes that each rollout rank receives from trainers.
        relayed: bytes that each rollout rank forwards to the next replica.
        trainer_staging, rollout_staging: largest number of bytes that a rank stages.
        messages: number of messages from trainers and between replicas.
        rectangles: number of strided pieces that trainer ranks pack.
    """

    sent: Spread
    received: Spread
    entered: Spread
    relayed: Spread
    trainer_staging: int
    rollout_staging: int
    buckets: int
    messages: int
    rectangles: int
    lower_bound_seconds: float
    predicted_seconds: float


@dataclass(frozen=True, order=True)
class PeerTraffic:
    """The traffic of one rank with one peer, in one direction. Rollout ranks are numbered after the trainers' ranks, replica by
    replica."""

    sends: bool
    peer: int
    nbytes: int
    messages: int


class RefitSchedule:
    """The schedule of one refit.

    Args:
        flows: the flows from the trainer to one engine.
        trainers, workers: number of ranks of the trainer, and of one engine.
        element_bytes: `[tensors]`, bytes of an element of each tensor in `flows.hf_names` as it is sent.
        replicas: number of engines that get the same weights.
        bucket_bytes: most bytes that one rank sends or receives in one bucket.
    """

    def __init__(
        self,
        flows: Flows,
        trainers: int,
        workers: int,
        element_bytes: np.ndarray,
        *,
        replicas: int = 1,
        bucket_bytes: int = 256 << 20,
    ) -> None:
        self._trainers, self._workers, self._replicas = trainers, workers, replicas
        self._rectangles = int(flows.rectangles.sum())
        nbytes = flows.elements * element_bytes[flows.tensor]
        first, chunks = _buckets(flows, nbytes, bucket_bytes)
        chunks = chunks[flows.tensor]
        chunk = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        tensor_bytes, pieces = np.repeat(nbytes, chunks), np.repeat(chunks, chunks)
        # One row per message: bytes from one trainer rank to one worker in one bucket.
        bucket, source, target = (np.repeat(column, chunks) for column in (first[flows.tensor], flows.source, flows.target))
        (self._bucket, self._source, self._target), self._nbytes = _summed(
            [bucket + chunk, source, target], tensor_bytes * (chunk + 1) // pieces - tensor_bytes * chunk // pieces
        )
        self.buckets = int(self._bucket.max(initial=-1)) + 1

    def estimate(self, links: Links) -> Estimate:
        sent = np.bincount(self._source, self._nbytes, self._trainers)
        received = np.bincount(self._target, self._nbytes, self._workers)
        entered = np.bincount(self._entry * self._workers + self._target, self._nbytes, self._replicas * self._workers)
        # The last replica of the chain, which is the one before the entry, forwards nothing.
        relayed = np.tile(received, self._replicas) - np.roll(entered, -self._workers)
        packed = _summed([self._bucket, self._source], self._nbytes)
        unpacked = _summed([self._bucket, self._target], self._nbytes)
        relays = (self._replicas - 1) * len(unpacked[1])
        busiest = max(sent.max() / links.trainer_bandwidth, max(received.max(), relayed.max()) / links.rollout_bandwidth)
        return Estimate(
            sent=Spread.of(sent),
            received=Spread.of(np.tile(received, self._replicas)),
            entered=Spread.of(entered),
            relayed=Spread.of(relayed),
            trainer_staging=2 * int(packed[1].max(initial=0)),
            rollout_staging=2 * int(unpacked[1].max(initial=0)),
            buckets=self.buckets,
            messages=len(self._nbytes) + relays,
            rectangles=self._rectangles,
            lower_bound_seconds=float(busiest),
            predicted_seconds=self._predicted_seconds(links),
        )

    def exchanges(self, rank: int) -> list[PeerTraffic]:
        """The bytes and messages that `rank` sends and receives, by peer. Rollout ranks are numbered after the trainers'
        ranks."""
        if rank < self._trainers:
            is_sender = self._source == rank
            peers = self._trainers + self._entry * self._workers + self._target
            return sorted(self._by_peer(is_sender, peers, sends=True))
        replica, worker = divmod(rank - self._trainers, self._workers)
        needed = self._target == worker
        traffic = self._by_peer(needed & (self._entry == replica), self._source, sends=False)
        for neighbour, sends in ((replica - 1, False), (replica + 1, True)):
            sender, receiver = (replica, neighbour % self._replicas) if sends else (neighbour % self._replicas, replica)
            if sender != receiver:
                relayed = needed & (self._entry != receiver)
                messages = len(np.unique(self._bucket[relayed]))
                peer = self._trainers + neighbour % self._replicas * self._workers + worker
                traffic.append(PeerTraffic(sends, peer, int(self._nbytes[relayed].sum()), messages))
        return sorted(traffic)

    @property
    def _entry(self) -> np.ndarray:
        """The replica at which each message enters."""
        return self._bucket % self._replicas

    def _by_peer(self, rows: np.ndarray, peers: np.ndarray, *, sends: bool) -> list[PeerTraffic]:
        (peer,), nbytes = _summed([peers[rows]], self._nbytes[rows])
        messages = np.bincount(peers[rows])[peer] if len(peer) else peer
        return [PeerTraffic(sends, *row) for row in zip(peer.tolist(), nbytes.tolist(), messages.tolist(), strict=True)]

    def _predicted_seconds(self, links: Links) -> float:
        if not self.buckets:
            return 0.0
        seconds = np.zeros(self.buckets)
        for ranks, bandwidth in ((self._source, links.trainer_bandwidth), (self._target, links.rollout_bandwidth)):
            (bucket, _), nbytes = _summed([self._bucket, ranks], self._nbytes)
            _, messages = _summed([self._bucket, ranks], np.ones_like(self._nbytes))
            np.maximum.at(seconds, bucket, nbytes / bandwidth + messages * links.message_seconds)
        return float(seconds.sum() + (self._replicas - 1) * seconds[-1])


def _summed(keys: Sequence[np.ndarray], values: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Sums `values` over rows with equal keys: returns the distinct keys in order, and their sums."""
    if not len(values):
        return list(keys), values
    order = np.lexsort(keys[::-1])
    ordered = np.stack([key[order] for key in keys])
    starts = np.flatnonzero(np.concatenate([[True], np.any(ordered[:, 1:] != ordered[:, :-1], axis=0)]))
    return list(ordered[:, starts]), np.add.reduceat(values[order], starts)


def _buckets(flows: Flows, nbytes: np.ndarray, bucket_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """`[tensors]` each: the bucket in which a tensor begins, and how many buckets it takes."""
    first, chunks = np.zeros(len(flows.hf_names), dtype=np.int64), np.ones(len(flows.hf_names), dtype=np.int64)
    begins = np.flatnonzero(np.diff(flows.sections, prepend=-1, append=-1))
    rows = np.searchsorted(flows.tensor, begins)
    senders = int(flows.source.max(initial=-1)) + 1
    filler = _BucketFiller(senders + int(flows.target.max(initial=-1)) + 1, bucket_bytes)
    for (begin, end), (row, last_row) in zip(pairwise(begins), pairwise(rows), strict=True):
        tensor, amounts = flows.tensor[row:last_row] - begin, nbytes[row:last_row]
        sending, sent = _by_rank(end - begin, tensor, flows.source[row:last_row], amounts)
        receiving, received = _by_rank(end - begin, tensor, flows.target[row:last_row], amounts)
        order = _sending_order(sent)
        filled = filler.fill(np.concatenate([sending, senders + receiving]), np.concatenate([sent, received], axis=1)[order])
        first[begin + order], chunks[begin + order] = filled
    return first, chunks


def _by_rank(tensors: int, tensor: np.ndarray, rank: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranks that take part, and the bytes of each, `[tensors, ranks]`."""
    ranks, column = np.unique(rank, return_inverse=True)
    matrix = np.zeros((tensors, len(ranks)), dtype=np.int64)
    np.add.at(matrix, (tensor, column), nbytes)
    return ranks, matrix


def _sending_order(sent: np.ndarray) -> np.ndarray:
    """The order of the tensors, `[tensors]`, by the number of bytes that their senders have to send before them."""
    before = np.cumsum(sent, axis=0) - sent
    return np.argsort(np.max(before, axis=1, where=sent > 0, initial=0), kind="stable")


class _BucketFiller:
    """Puts tensors into buckets, one after the other, and begins a new bucket when a rank would exceed its limit."""

    def __init__(self, ranks: int, bucket_bytes: int) -> None:
        self._limit, self._bucket, self._empty = bucket_bytes, 0, True
        self._filled = np.zeros(ranks, dtype=np.int64)

    def fill(self, ranks: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`[tensors]` each: the first bucket and the number of buckets of every tensor, given the bytes `[tensors, ranks]`."""
        first, chunks = np.zeros(len(nbytes), dtype=np.int64), np.ones(len(nbytes), dtype=np.int64)
        begin, window = 0, 64
        while begin < len(nbytes):
            ahead = np.cumsum(nbytes[begin : begin + window], axis=0)
            too_much = (self._filled[ranks] + ahead > self._limit).any(axis=1)
            fitting = int(too_much.argmax()) if too_much.any() else len(ahead)
            if fitting:
                first[begin : begin + fitting] = self._bucket
                self._filled[ranks] += ahead[fitting - 1]
                self._empty = False
                begin += fitting
            elif self._empty:  # the tensor fits into no bucket
                chunks[begin] = -(-nbytes[begin].max() // self._limit)
                first[begin] = self._bucket
                self._bucket += int(chunks[begin])
                begin += 1
            else:
                self._bucket, self._empty = self._bucket + 1, True
                self._filled[:] = 0
            window = max(64, 2 * fitting)
        return first, chunks
