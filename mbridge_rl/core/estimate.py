"""What a refit costs, from its plan alone: bytes, balance, messages, staging memory and time, without weights or devices.

The schedule that is costed: layers go in checkpoint order and, inside of a layer, tensors in the order in which their senders
get free, so that experts of many ranks travel side by side. Consecutive tensors make a bucket, as many as fit without any rank
sending or receiving more than `bucket_bytes` of it (a tensor that does not fit is cut evenly); what a rank sends to another in
a bucket is one message. Two buckets are staged: one travels while the other is packed or consumed.

Engines are fed by relay: bucket `b` enters at replica `b % replicas`, and every replica hands it on to the next while it comes
in. So trainers send each byte once however many replicas there are, and nobody receives one twice.

The lower bound of the time is what the busiest link needs for its bytes. The prediction takes bucket after bucket, each as long
as the bytes and messages of its busiest rank take, and adds the way of the last bucket through the replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mbridge_rl.core.templates import Flows


@dataclass(frozen=True)
class Links:
    """A rank's network: bytes per second in each direction at once, and seconds that a message costs beside its bytes."""

    trainer_bandwidth: float = 50e9
    rollout_bandwidth: float = 50e9
    message_seconds: float = 10e-6


@dataclass(frozen=True)
class Spread:
    """A number of bytes over the ranks of one side."""

    minimum: int
    mean: float
    maximum: int
    total: int

    @property
    def balance(self) -> float:
        """Largest over mean: 1 where all ranks have the same."""
        return self.maximum / self.mean if self.mean else 1.0

    @staticmethod
    def of(values: np.ndarray) -> Spread:
        return Spread(int(values.min()), float(values.mean()), int(values.max()), int(values.sum()))


@dataclass(frozen=True)
class Estimate:
    """The costs of one refit, in bytes and seconds.

    Attributes:
        sent: by each trainer rank.
        received: by each rollout rank, whoever sent it.
        entered: the part that trainers sent.
        relayed: by each rollout rank, to the next replica.
        trainer_staging, rollout_staging: the largest that a rank stages.
        messages: from trainers and between replicas.
        rectangles: strided pieces that trainer ranks pack.
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
class Exchange:
    """What one rank sends to another, or receives. Rollout ranks count on after the trainers', replica by replica."""

    sends: bool
    peer: int
    nbytes: int
    messages: int


class Refit:
    """The schedule of one refit.

    Args:
        flows: from the trainer to one engine.
        trainers, workers: ranks of the trainer, and of one engine.
        element_bytes: `[tensors]`, of every tensor of `flows.hf_names` as it travels.
        replicas: engines that get the same weights.
        bucket_bytes: what one rank sends or receives in one bucket at most.
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
        whole, pieces = np.repeat(nbytes, chunks), np.repeat(chunks, chunks)
        # One row per message: bytes from one trainer rank to one worker in one bucket.
        bucket, source, target = (np.repeat(column, chunks) for column in (first[flows.tensor], flows.source, flows.target))
        (self._bucket, self._source, self._target), self._nbytes = _summed(
            [bucket + chunk, source, target], whole * (chunk + 1) // pieces - whole * chunk // pieces
        )
        self.buckets = int(self._bucket.max(initial=-1)) + 1

    def estimate(self, links: Links) -> Estimate:
        sent = np.bincount(self._source, self._nbytes, self._trainers)
        received = np.bincount(self._target, self._nbytes, self._workers)
        entered = np.bincount(self._entry * self._workers + self._target, self._nbytes, self._replicas * self._workers)
        # The last of the chain, which is the one before the entry, hands nothing on.
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

    def exchanges(self, rank: int) -> list[Exchange]:
        """What `rank` sends and receives, by peer; rollout ranks count on after the trainers'."""
        if rank < self._trainers:
            mine = self._source == rank
            peers = self._trainers + self._entry * self._workers + self._target
            return sorted(self._by_peer(mine, peers, sends=True))
        replica, worker = divmod(rank - self._trainers, self._workers)
        needed = self._target == worker
        found = self._by_peer(needed & (self._entry == replica), self._source, sends=False)
        for neighbour, sends in ((replica - 1, False), (replica + 1, True)):
            giver, taker = (replica, neighbour % self._replicas) if sends else (neighbour % self._replicas, replica)
            if giver != taker:
                handed = needed & (self._entry != taker)
                messages = len(np.unique(self._bucket[handed]))
                peer = self._trainers + neighbour % self._replicas * self._workers + worker
                found.append(Exchange(sends, peer, int(self._nbytes[handed].sum()), messages))
        return sorted(found)

    @property
    def _entry(self) -> np.ndarray:
        """The replica at which each message enters."""
        return self._bucket % self._replicas

    def _by_peer(self, rows: np.ndarray, peers: np.ndarray, *, sends: bool) -> list[Exchange]:
        (found,), nbytes = _summed([peers[rows]], self._nbytes[rows])
        messages = np.bincount(peers[rows])[found] if len(found) else found
        return [Exchange(sends, *of_peer) for of_peer in zip(found.tolist(), nbytes.tolist(), messages.tolist(), strict=True)]

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
    """Sums of `values` over rows with equal keys: the different keys, in order, and their sums."""
    if not len(values):
        return list(keys), values
    order = np.lexsort(keys[::-1])
    ordered = np.stack([key[order] for key in keys])
    starts = np.flatnonzero(np.concatenate([[True], np.any(ordered[:, 1:] != ordered[:, :-1], axis=0)]))
    return list(ordered[:, starts]), np.add.reduceat(values[order], starts)


def _buckets(flows: Flows, nbytes: np.ndarray, bucket_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """`[tensors]` each: the bucket that a tensor begins in, and how many it takes."""
    first, chunks = np.zeros(len(flows.hf_names), dtype=np.int64), np.ones(len(flows.hf_names), dtype=np.int64)
    begins = np.flatnonzero(np.diff(flows.sections, prepend=-1, append=-1))
    rows = np.searchsorted(flows.tensor, begins)
    senders = int(flows.source.max(initial=-1)) + 1
    dealer = _Dealer(senders + int(flows.target.max(initial=-1)) + 1, bucket_bytes)
    for (begin, end), (row, last_row) in zip(pairwise(begins), pairwise(rows), strict=True):
        tensor, amounts = flows.tensor[row:last_row] - begin, nbytes[row:last_row]
        sending, sent = _by_rank(end - begin, tensor, flows.source[row:last_row], amounts)
        receiving, received = _by_rank(end - begin, tensor, flows.target[row:last_row], amounts)
        order = _in_turn(sent)
        dealt = dealer.deal(np.concatenate([sending, senders + receiving]), np.concatenate([sent, received], axis=1)[order])
        first[begin + order], chunks[begin + order] = dealt
    return first, chunks


def _by_rank(tensors: int, tensor: np.ndarray, rank: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranks that take part, and `[tensors, ranks]` bytes of each."""
    ranks, column = np.unique(rank, return_inverse=True)
    matrix = np.zeros((tensors, len(ranks)), dtype=np.int64)
    np.add.at(matrix, (tensor, column), nbytes)
    return ranks, matrix


def _in_turn(sent: np.ndarray) -> np.ndarray:
    """The order of the tensors, `[tensors]`, by the bytes that their senders have to send before them."""
    before = np.cumsum(sent, axis=0) - sent
    return np.argsort(np.max(before, axis=1, where=sent > 0, initial=0), kind="stable")


class _Dealer:
    """Deals tensors to buckets, one after the other, closing a bucket when a rank would have more than fits."""

    def __init__(self, ranks: int, bucket_bytes: int) -> None:
        self._limit, self._bucket, self._empty = bucket_bytes, 0, True
        self._filled = np.zeros(ranks, dtype=np.int64)

    def deal(self, ranks: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`[tensors]` each: bucket and number of buckets, given `[tensors, ranks]` bytes of `ranks`."""
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
            elif self._empty:  # it fits into no bucket
                chunks[begin] = -(-nbytes[begin].max() // self._limit)
                first[begin] = self._bucket
                self._bucket += int(chunks[begin])
                begin += 1
            else:
                self._bucket, self._empty = self._bucket + 1, True
                self._filled[:] = 0
            window = max(64, 2 * fitting)
        return first, chunks
