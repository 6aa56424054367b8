"""Megatron-core without CUDA: a pure-torch Transformer Engine, attention, recurrences and a stand-in for the device.

`runtime.megatron_runtime` puts them in place for a scope. Everything here imports torch, Megatron-core and `core`, and no other
folder of this library.
"""
