"""Megatron-core without CUDA: a pure-torch Transformer Engine, attention, recurrences and a stand-in for the device, which
`megatron_runtime` puts in place for a scope. Everything here imports torch, Megatron-core and `core`, nothing else of ours.
"""
