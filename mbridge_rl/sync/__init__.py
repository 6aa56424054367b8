"""Moves weights from a trainer into engines as a transaction, and back: `weight_sync.WeightSync` is the entry. `payload` holds
what a sync sends, `trainer` and `worker` are its two ends, `transports` carry the bytes, `record` reports what happened, and
`store` is the memory that a trainer and its engines share. Only `vllm` knows an engine. Imports `bridge` and what is below it.
"""
