"""Adapters in vLLM's LoRA slots: which slot holds which version of which adapter, and the methods of an engine that takes
adapters."""
