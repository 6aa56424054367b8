"""Adapters in vLLM's LoRA slots: which slot holds which adapter of which version, and the calls of an engine that takes
them."""
