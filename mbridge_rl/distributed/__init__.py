"""What the trainer's ranks do together: import, export streams, save, reshard and verify.

`group` is the group of ranks; `arena` and its neighbours are the shared memory and the files that ranks exchange bytes through.
Nearly every function is collective. This folder imports `megatron`, `hf` and `core`, and knows no engines.
"""
