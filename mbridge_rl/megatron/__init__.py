"""Megatron-core models: how one is built from a bridge's config, which parameters of which rank are which, and a forward pass.
The one folder that knows Megatron's modules. Imports `core` only.
"""
