"""Hugging Face checkpoints: reads and writes `config.json`, safetensors files and PEFT adapters, in every variant that
published checkpoints have. This folder imports `core` only.
"""
