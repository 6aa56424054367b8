"""The vLLM end of a weight sync: the kinds of engines (`engines`), what runs in their workers (`worker`) and their LoRA slots
(`lora`). `extension` is the worker extension that a user names to vLLM, and `plugin` is what vLLM itself calls in each process.
Importing this package does not import vLLM; some of its modules do.
"""
