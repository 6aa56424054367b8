"""Megatron-core models: builds one from a bridge's config, lists the live parameters of each rank by global names, and runs a
forward pass. This is the only folder that knows Megatron's modules. It imports `core` only.
"""
