"""Moving weights from a trainer into engines as a transaction, and out of them: `weight_sync.WeightSync` is the entry. What a
sync sends is in `payload`, its two ends are `trainer` and `worker`, the ways of sending are `transports`, what happened is in
`record`, and `store` is the memory that a trainer and its engines share. Only `vllm` knows an engine. Imports `bridge` and what
is below it.
"""
