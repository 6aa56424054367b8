"""Weight syncs: each brings a version of the trainer's weights into engines, as a transaction; `pull` is the way back.

`weight_sync.WeightSync` is the entry. `payload` says which bytes each worker gets, `trainer` and `worker` are the two ends,
`transports` carry the bytes, `store` keeps the last version for engines that come late, and `record` reports what happened.
Only `vllm` knows vLLM. This folder imports `bridge` and what is below it.
"""
