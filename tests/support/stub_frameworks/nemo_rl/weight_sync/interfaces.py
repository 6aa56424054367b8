"""The contract of NeMo-RL's weight synchronizers (commit 7ea279a, August 2026): what must be defined."""

from abc import ABC, abstractmethod


class WeightSynchronizer(ABC):
    @abstractmethod
    def sync_weights(self, *, timer=None, kv_scales=None): ...

    @property
    @abstractmethod
    def is_stale(self): ...

    @abstractmethod
    def init_communicator(self): ...

    @abstractmethod
    def shutdown(self): ...
