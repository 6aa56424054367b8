"""Opens tokenizers without running their code, and checks that they have the tokens and templates that a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mbridge_rl.training.rollout.rewards import described_error
from mbridge_rl.training.run.config_file import ConfigError


def open_tokenizer(where: str | Path) -> Any:
    """Opens the tokenizer of a directory, or of a repository on the hub, and gives it a padding token if it has none.

    Raises:
        ConfigError: there is no tokenizer, or it cannot be read, or it has no token that could pad.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # Transformers and tokenizers raise many types; all of them mean this
        raise ConfigError(f"model.tokenizer: {where} has no tokenizer that can be read: {described_error(error)}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(f"model.tokenizer: {where} has neither a padding token nor one that ends a text")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id  # padding is never attended to and never in a mask
    return tokenizer


def in_chat_template(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The prompt that a tokenizer's chat template makes of messages.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "task.chat: the tokenizer has no chat template; name one that has (model.tokenizer), or leave task.chat out"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of the tokenizer's author
        hint = "; does it take a system message (task.system)?" if len(messages) > 1 else ""
        raise ConfigError(f"task.chat: the tokenizer's chat template fails: {described_error(error)}{hint}") from error
