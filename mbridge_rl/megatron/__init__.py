"""Megatron-core models: builds them from a bridge's config, names the parameters of every rank, and runs forward passes. This
is the only folder that knows Megatron's modules. It imports `core` only.
"""
