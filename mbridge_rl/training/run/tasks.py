"""Tasks: problems and the function that rewards their answers, from configuration.

`reasoning-gym` and `math-verify` are optional: `pip install 'mbridge-rl[tasks]'`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mbridge_rl.core.errors import missing_extra
from mbridge_rl.core.json_text import JSONTextError, parse_json
from mbridge_rl.core.typed_values import shown
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.rewards import (
    HTTPJudge,
    InProcessJudge,
    Judge,
    Problem,
    RewardFunction,
    exact_match,
    math_verify,
)
from mbridge_rl.training.run.config import RewardConfig, TaskConfig
from mbridge_rl.training.run.config_file import ConfigError
from mbridge_rl.training.run.tokenizer import in_chat_template

_MOST_LINE_BYTES = 16 << 20  # largest line of a file of problems


@dataclass(frozen=True)
class Task:
    """Problems with the prompts that the model sees, and the task's own reward."""

    problems: list[Problem]
    reward: RewardFunction


def make_task(config: TaskConfig, tokenizer: Any = None) -> Task:
    """The task of a configuration.

    Args:
        tokenizer: the tokenizer with the chat template that `config.chat` uses.

    Raises:
        ConfigError: the dataset, file or function does not exist or has no problems, or the prompt's format does not fit them.
        ImportError: reasoning-gym is not installed.
    """
    makers: dict[str, Callable[[TaskConfig], Task]] = {
        "sums": _sums,
        "reasoning-gym": _reasoning_gym,
        "jsonl": _jsonl,
        "python": _python,
    }
    task = makers[config.kind](config)
    if not task.problems:
        raise ConfigError(f"task: {config.kind} {config.dataset or ''} has no problems")
    return replace(task, problems=[_with_prompt(problem, config, tokenizer) for problem in task.problems])


def make_judge(task: TaskConfig, reward: RewardConfig) -> Judge:
    """Makes the judge that the configuration describes."""
    if reward.function.startswith(("http://", "https://")):
        return HTTPJudge(reward.function, reward.timeout)
    factory = partial(reward_function, task, reward)
    if reward.workers:
        from mbridge_rl.training.rollout.reward_pool import PoolJudge

        return PoolJudge(factory, reward.workers, reward.timeout)
    return InProcessJudge(factory(), reward.timeout)


def reward_function(task: TaskConfig, reward: RewardConfig) -> RewardFunction:
    """The reward function that a configuration names.

    Raises:
        ConfigError: there is no function of this name.
    """
    known: dict[str, RewardFunction] = {"exact": exact_match, "math-verify": math_verify}
    if reward.function == "task":
        return make_task(replace(task, prompt="{question}", chat=False)).reward
    return known.get(reward.function) or imported(reward.function, "reward.function")


def imported(path: str, field: str) -> Any:
    """Imports the object that `path`, `module:name`, names.

    Raises:
        ConfigError: the path or the name is wrong; the message names `field`.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise ConfigError(f"{field}: {path!r} is none of the known names; write module:name for your own")
    try:
        return getattr(importlib.import_module(module), name)
    except (
        ImportError,
        AttributeError,
        ValueError,
        TypeError,
    ) as error:  # an empty or relative name is a ValueError, TypeError
        raise ConfigError(f"{field}: {path!r} cannot be imported: {error}") from error


def _sums(config: TaskConfig) -> Task:
    return Task(toy.sums(), exact_match)


def _reasoning_gym(config: TaskConfig) -> Task:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise missing_extra("tasks of reasoning-gym need it", "tasks") from error
    if config.dataset not in DATASETS:
        raise ConfigError(f"task.dataset: reasoning-gym has no {config.dataset!r}; it has {', '.join(sorted(DATASETS))}")
    try:
        dataset = reasoning_gym.create_dataset(config.dataset, size=config.size, seed=config.seed, **config.options)
    except (TypeError, AssertionError) as error:  # the library checks its arguments by assertions
        raise ConfigError(f"task.options: reasoning-gym's {config.dataset} refuses them: {error}") from error
    problems = [Problem(entry["question"], entry["answer"], entry["metadata"] | {"entry": entry}) for entry in dataset]
    return Task(problems, partial(_score, dataset.score_answer))


def _score(score_answer: Callable[[str, dict[str, Any]], float], problem: Problem, completion: str) -> float:
    return score_answer(completion.strip(), problem.metadata["entry"])


def _jsonl(config: TaskConfig) -> Task:
    path = Path(config.dataset or "")
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()][: config.size]
    except OSError as error:
        raise ConfigError(f"task.dataset: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"task.dataset: {path} is no text in UTF-8: {error}") from error
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line, most_bytes=_MOST_LINE_BYTES)
        except JSONTextError as error:
            raise ConfigError(f"task.dataset: {path}, line {number}: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
            raise ConfigError(
                f"task.dataset: {path}, line {number}: an object with a question (and answer) is needed, found {shown(entry)}"
            )
        problems.append(Problem(entry["question"], str(entry.get("answer", "")), entry))
    return Task(problems, exact_match)


def _python(config: TaskConfig) -> Task:
    try:
        problems = list(imported(config.dataset or "", "task.dataset")(**config.options))[: config.size]
    except TypeError as error:
        raise ConfigError(f"task.options: {config.dataset} refuses them: {error}") from error
    if wrong := [problem for problem in problems if not isinstance(problem, Problem)]:
        raise ConfigError(f"task.dataset: {config.dataset} must return problems, found {shown(wrong[0])} among them")
    return Task(problems, exact_match)


def _with_prompt(problem: Problem, config: TaskConfig, tokenizer: Any) -> Problem:
    try:
        prompt = config.prompt.format(question=problem.prompt, answer=problem.answer, metadata=problem.metadata)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"task.prompt: {config.prompt!r} does not fit a problem: {type(error).__name__}: {error}; "
            f"there are question, answer and metadata[...] of {', '.join(map(str, problem.metadata)) or 'nothing'}"
        ) from error
    if config.chat:
        messages = [{"role": "system", "content": config.system}] if config.system else []
        messages.append({"role": "user", "content": prompt})
        prompt = in_chat_template(tokenizer, messages)
    return replace(problem, prompt=prompt)


def usable_problems(
    problems: Sequence[Problem], tokenizer: Any, limit: int, *, refuse: bool
) -> tuple[list[Problem], dict[str, int]]:
    """The problems whose prompts have at least one and at most `limit` tokens, and the number of those left out, by reason.

    Raises:
        ConfigError: no problem is left, or one would be left out and `refuse` is set.
    """
    usable, left_out = [], {"empty": 0, f"longer than {limit} tokens": 0}
    for problem in problems:
        length = len(tokenizer.encode(problem.prompt))
        if 1 <= length <= limit:
            usable.append(problem)
            continue
        left_out[list(left_out)[length > 0]] += 1
        if refuse:
            raise ConfigError(
                f"the prompt {problem.prompt[:60]!r} has {length} tokens, 1 to {limit} are allowed; rollout.long_prompts=drop "
                "leaves such prompts out"
            )
    if not usable:
        raise ConfigError(
            f"none of {len(problems)} prompts has 1 to {limit} tokens: raise engine.max_model_len or rollout.max_prompt_tokens"
        )
    return usable, {reason: count for reason, count in left_out.items() if count}
