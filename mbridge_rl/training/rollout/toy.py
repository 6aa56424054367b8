"""A task small enough for a laptop: the hundred sums of two digits, `3+4=` -> `7`, and tiny models that learn it.

Everything else is as in a real run: the models have a Hugging Face tokenizer and checkpoint on disk, and belong to families
that vLLM and Megatron both know. The vocabulary has 15 entries, so that tensor parallelism has to pad it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbridge_rl.hf.publish import Replacement
from mbridge_rl.training.rollout.rewards import Problem

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHARACTERS = "0123456789+="
PROMPT_TOKENS = 4
ANSWER_TOKENS = 3  # two digits and the end

_CLASSES = {"qwen3": "Qwen3", "qwen3-moe": "Qwen3Moe", "llama": "Llama"}
MODELS = tuple(_CLASSES)
_SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,  # the smallest head for which vLLM has CPU attention
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    # Five times the usual range: a random network of this size then distinguishes the sums from the start.
    "initializer_range": 0.1,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,  # vLLM's CPU kernels want multiples of 32
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def sums() -> list[Problem]:
    """The hundred problems, `0+0=` to `9+9=`."""
    return [Problem(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]


def tokenizer(characters: str = CHARACTERS) -> Any:
    """A `PreTrainedTokenizerFast` with one token per character, which adds no special tokens. Unknown characters become
    padding."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def model_config(model: str = "qwen3", *, num_layers: int = 2, characters: str = CHARACTERS) -> Any:
    """The Transformers config of a toy model.

    Args:
        model: one of `MODELS`.
        characters: the characters that the tokenizer knows.

    Raises:
        ValueError: the model is unknown.
    """
    import transformers

    if model not in _CLASSES:
        raise ValueError(f"unknown toy model {model!r}: choose from {', '.join(MODELS)}")
    tokens = tokenizer(characters)
    return getattr(transformers, f"{_CLASSES[model]}Config")(
        **_SIZES,
        **(_EXPERTS if model == "qwen3-moe" else {}),
        architectures=[f"{_CLASSES[model]}ForCausalLM"],
        num_hidden_layers=num_layers,
        vocab_size=len(tokens),
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )


def make_checkpoint(
    directory: str | Path, model: str = "qwen3", *, seed: int = 0, num_layers: int = 2, characters: str = CHARACTERS
) -> Path:
    """Writes a random fp32 checkpoint with its tokenizer. Takes the arguments of `model_config` and raises the same errors."""
    import torch
    import transformers

    config = model_config(model, num_layers=num_layers, characters=characters)
    replacement = Replacement(directory)
    replacement.begin()
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            network = getattr(transformers, config.architectures[0])(config)
            network.save_pretrained(replacement.path)
        tokenizer(characters).save_pretrained(replacement.path)
        replacement.publish(durable=False)
    finally:
        replacement.end()
    return Path(directory)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns Transformers' progress bars off inside of the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
