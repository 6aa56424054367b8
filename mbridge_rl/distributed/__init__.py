"""What trainer ranks do together: the group of ranks, streams of HF tensors, import, save, reshard and verify, and the shared
memory and files through which ranks exchange tensors. Nearly every function here is collective. Imports `megatron`, `hf` and
`core`; does not know engines.
"""
