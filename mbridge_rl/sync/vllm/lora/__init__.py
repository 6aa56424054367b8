"""Adapters in vLLM's LoRA slots: `adapter_slots` says which slot of a worker holds which version of which adapter, and
`adaptable_engine` is the part of an engine that takes adapters.
"""
