"""The trainer's ranks together: the group of ranks, streams of HF tensors, import, save, reshard and verify, and the shared
memory and files that ranks exchange them through. Nearly every function here is collective. Imports `megatron`, `hf` and
`core`; knows nothing of engines.
"""
