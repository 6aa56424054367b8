"""Hugging Face checkpoints: reading and writing `config.json`, safetensors files and PEFT adapters, with all that published
checkpoints vary in. Imports `core` only.
"""
