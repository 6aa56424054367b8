"""The vLLM end of a weight sync: the kinds of engines (`engines`), what runs in their workers (`worker`) and their LoRA slots
(`lora`). `extension` and `plugin` are the names that users give to vLLM. Importing this package imports no vLLM; its modules
do.
"""
