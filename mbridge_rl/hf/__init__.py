"""Hugging Face checkpoints: reading and writing of `config.json`, safetensors files and PEFT adapters, in all variants of
published checkpoints. Imports `core` only.
"""
