"""The weight store: memory or files that hold whole versions, which a trainer writes and engines read at any time.

`weight_store` has the class; the other files are its slots, its images, and the locks that say which trainer may write. This
folder imports `distributed` and `core`.
"""

from mbridge_rl.sync.store.weight_store import WeightStore

__all__ = ["WeightStore"]
