"""Hugging Face -> Megatron ranks -> Hugging Face, in one process and without a GPU.

    python convert_checkpoint.py CHECKPOINT OUTPUT --tp 2 --pp 2 --ep 1

Shards a checkpoint as Megatron would hold it on every rank of a layout, writes one safetensors file per rank, reads them back,
and joins them to a Hugging Face checkpoint again, which equals the first one bit for bit. Without arguments it converts a tiny
random Qwen3.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mbridge_rl import AutoBridge, ParallelLayout
from mbridge_rl.hf.checkpoint import Checkpoint


def tiny_qwen3(directory: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=515, hidden_size=64, intermediate_size=136, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def convert(checkpoint: Path, output: Path, layout: ParallelLayout) -> None:
    bridge = AutoBridge.from_pretrained(checkpoint)
    hf_state = Checkpoint(checkpoint)

    shards = bridge.shard(hf_state, layout)
    output.mkdir(parents=True, exist_ok=True)
    for rank, tensors in shards.items():
        save_file(tensors, output / f"megatron-rank-{rank:03}.safetensors")
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        print(f"rank {rank}: {len(tensors)} tensors, {nbytes / 1e6:.2f} MB, such as {next(iter(tensors))}")

    read_back = {rank: load_file(output / f"megatron-rank-{rank:03}.safetensors") for rank in range(layout.world_size)}
    joined = bridge.unshard(read_back, layout)
    assert all(torch.equal(joined[hf_name], hf_state[hf_name]) for hf_name in bridge.spec.hf_shapes)
    save_file(joined, output / "model.safetensors", metadata={"format": "pt"})
    bridge.hf_config.save_pretrained(output)
    print(f"{len(joined)} tensors came back bit for bit; {output} is a Hugging Face checkpoint again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    for axis in ("tp", "pp", "ep", "etp", "dp"):
        parser.add_argument(f"--{axis}", type=int, default={"tp": 2, "pp": 2, "etp": None}.get(axis, 1))
    arguments = parser.parse_args()
    layout = ParallelLayout(tp=arguments.tp, pp=arguments.pp, ep=arguments.ep, etp=arguments.etp, dp=arguments.dp)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = arguments.checkpoint or tiny_qwen3(Path(scratch) / "tiny-qwen3")
        convert(checkpoint, arguments.output or Path(scratch) / "converted", layout)


if __name__ == "__main__":
    main()
