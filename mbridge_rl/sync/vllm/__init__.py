"""The vLLM end of a weight sync: the kinds of engines (`engines`), the code in their workers (`worker`) and their LoRA slots
(`lora`). Users name `extension` and `plugin` to vLLM. Importing this package does not import vLLM; its modules do.
"""
