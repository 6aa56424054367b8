"""The configuration of `mbridge-rl train`: one dataclass per section of its YAML file, with the defaults of its fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from mbridge_rl.bridges import Numerics
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.typed_values import (
    AtLeastOne,
    AtLeastZero,
    Bytes,
    NotNegative,
    Positive,
    Range,
    Seconds,
    Seed,
    Share,
    Threads,
    range_problems,
    shown,
)
from mbridge_rl.megatron.lora.attach import LoRAConfig
from mbridge_rl.sync.options import SyncOptions
from mbridge_rl.training.objectives.config import GRPOConfig
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.run.config_file import ConfigError, read_config
from mbridge_rl.training.trainer.megatron_trainer import TrainerConfig

TOY = "toy:"
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM allows for `max_lora_rank`
MAX_ADAPTER_RANK = ADAPTER_RANKS[-1]


@dataclass(frozen=True)
class ToyConfig:
    """Attributes:
    characters: the characters that the tokenizer knows.
    """

    num_layers: AtLeastOne = 2
    characters: str = toy.CHARACTERS

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) < len(self.characters):
            raise ValueError(f"characters must be text in which each letter stands once, found {shown(self.characters)}")


@dataclass(frozen=True)
class ModelConfig:
    """Attributes:
    path: a Hugging Face checkpoint's directory, a bundled config's name (such a run can only be planned), or `toy:qwen3`,
        `toy:qwen3-moe`, `toy:llama`: a tiny random checkpoint that the run makes for itself.
    tokenizer: a tokenizer's directory; by default the checkpoint's own.
    dtype: the dtype of the trainer's parameters and, unless the engine section sets another, of the engine.
    sequence_parallel, overrides: see `AutoBridge.build_model`.
    numerics: whose arithmetic the policy follows where Transformers and vLLM differ (docs/models.md). The default is that of
        vLLM, which samples.
    toy: the sizes of a toy model.
    """

    path: str
    tokenizer: str | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    sequence_parallel: bool | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    numerics: Numerics = "vllm"
    toy: ToyConfig | None = None


@dataclass(frozen=True)
class WarmUpConfig:
    """Supervised steps on the task's answers before the first rollout, for models that solve nothing yet.

    Attributes:
        accuracy: the greedy accuracy of the trainer on the answers at which the warm-up ends; 0 leaves the warm-up out.
        max_steps: the run ends if the accuracy is not reached after so many steps.
        problems: number of the task's problems that are used, from the first.
    """

    accuracy: Share = 0.0
    learning_rate: Positive = 2e-4
    max_steps: AtLeastZero = 500
    problems: AtLeastOne = 256


@dataclass(frozen=True)
class RolloutConfig:
    """Attributes:
    prompts_per_step: number of groups in a training step.
    max_prompt_tokens: longer prompts are handled as `long_prompts` says; `None` allows what the engine holds besides
        `max_tokens`.
    max_tokens: most tokens of a completion (all turns together), with its stop token.
    temperature: the temperature of sampling and of the trainer's log-probabilities.
    stop: texts that end a turn besides the tokenizer's end token; they stay in the completion.
    stop_token_ids: tokens that end a turn.
    mode: `sync` samples with the newest weights while the trainer waits; `one-step-off` samples the next batch while the
        trainer works on this one; `async` never waits, and completions go on across weight updates.
    max_staleness: in mode `async`, how many steps old the oldest token of a batch may be.
    segment_tokens: in mode `async`, number of tokens between two moments at which weights may change and prompts may join.
    max_rejected: with `algorithm.dynamic_sampling`, groups whose rewards are all equal are thrown away and others sampled
        before the trainer sees them. This limits their number per step, in multiples of `prompts_per_step`.
    environment: `module:Class` of a multi-turn environment; `None` means a single turn.
    max_turns: most turns of an episode.
    """

    prompts_per_step: AtLeastOne = 8
    max_prompt_tokens: AtLeastOne | None = None
    max_tokens: AtLeastOne = 256
    temperature: Positive = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[AtLeastZero, ...] = ()
    long_prompts: Literal["drop", "refuse"] = "drop"
    mode: Literal["sync", "one-step-off", "async"] = "sync"
    max_staleness: AtLeastZero = 2
    segment_tokens: AtLeastOne = 256
    max_rejected: AtLeastZero = 4
    environment: str | None = None
    max_turns: AtLeastOne = 1


@dataclass(frozen=True)
class EngineConfig:
    """Attributes:
    count: number of engines; prompts are divided among them.
    max_model_len: most tokens of a prompt with its completion.
    max_num_seqs: most completions that one engine samples at the same time.
    dtype: the engines' dtype; `None` takes the trainer's.
    restarts: how many lost engines are replaced before the run ends.
    threads: number of threads of a CPU engine.
    options: more arguments of `vllm.LLM`.
    """

    count: AtLeastOne = 1
    tensor_parallel_size: AtLeastOne = 1
    max_model_len: AtLeastOne = 1024
    max_num_seqs: AtLeastOne = 256
    kv_cache_bytes: Bytes = 1 << 27
    dtype: str | None = None
    restarts: AtLeastZero = 3
    threads: Threads = 1
    start_timeout: Seconds = 300.0
    call_timeout: Seconds = 600.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskConfig:
    """Attributes:
    kind: `sums` (the toy task), `reasoning-gym` (`dataset` is one of its names, `options` its arguments), `jsonl` (`dataset`
        is a file with `question` and `answer` in every line), or `python` (`dataset` is `module:function`, which is called
        with `options` and returns problems).
    size: number of problems.
    seed: which problems reasoning-gym makes.
    prompt: a format string over a problem's `question`, `answer` and `metadata`, as in `{metadata[expression]}=`.
    chat: put the prompt into the tokenizer's chat template, after `system`.
    order: `shuffled` draws all problems once per epoch; `unsolved-first` draws problems that the policy solves less often more
        often.
    evaluate_every: steps between two greedy evaluations on the first `evaluate_problems`; 0 never evaluates.
    """

    kind: Literal["sums", "reasoning-gym", "jsonl", "python"] = "sums"
    dataset: str | None = None
    size: AtLeastOne = 1000
    seed: Seed = 0
    options: dict[str, Any] = field(default_factory=dict)
    prompt: str = "{question}"
    chat: bool = False
    system: str | None = None
    order: Literal["shuffled", "unsolved-first"] = "shuffled"
    evaluate_every: AtLeastZero = 0
    evaluate_problems: AtLeastOne = 100


@dataclass(frozen=True)
class RewardConfig:
    """Attributes:
    function: `task` (the task's own reward), `exact`, `math-verify`, `module:function`, or the URL of a service.
    workers: number of processes that compute rewards; 0 computes them in the process of the first rank.
    timeout: seconds for one reward; needs workers or a URL.
    failed: what happens with a completion whose reward raised, timed out or is no number: `mask` takes it out of its group's
        baseline and of the loss, `zero` rewards it with 0, `raise` ends the run. Failures are always counted and logged.
    """

    function: str = "task"
    workers: AtLeastZero = 0
    timeout: Seconds = 30.0
    failed: Literal["mask", "zero", "raise"] = "mask"


@dataclass(frozen=True)
class SyncConfig(SyncOptions):
    """How weights are sent to the engines: all fields of `SyncOptions`, with its defaults. The run itself replaces lost engines
    (`engine.restarts`).

    Attributes:
        adapters: engines start on the base weights and have LoRA slots; only the adapters of `lora` are sent, without merging
            them.
    """

    adapters: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters and (changed := [name for name in _WEIGHT_OPTIONS if getattr(self, name) != _DEFAULTS[name]]):
            raise ConfigError(
                f"sync.adapters: adapters always travel staged, whole and verified, in the engine's dtype, so that "
                f"{', '.join(f'sync.{name}={getattr(self, name)}' for name in changed)} cannot be"
            )
        if self.lost_engines == "drop":
            raise ConfigError("sync.lost_engines=drop: a run replaces lost engines, engine.restarts says how many")
        if self.url is not None and self.transport != "files":
            raise ConfigError(f"sync.url={self.url} is for sync.transport=files, found {self.transport}")


_WEIGHT_OPTIONS = ("mode", "transport", "bucket_bytes", "verify", "store", "url", "delta", "quantization")
_DEFAULTS = {field.name: field.default for field in fields(SyncOptions)}


@dataclass(frozen=True)
class CheckpointConfig:
    """Attributes:
    every: steps between two checkpoints; with 0 there are none, and the run cannot be resumed.
    keep: how many of the newest checkpoints stay.
    export: whether the policy is written as a Hugging Face checkpoint at the end (`RUN/final`), and adapters in PEFT's format.
    """

    every: AtLeastZero = 0
    keep: AtLeastOne = 2
    export: bool = True


@dataclass(frozen=True)
class LoggingConfig:
    """Attributes:
    samples: number of completions per step that are written to `samples.jsonl`.
    prometheus_port: port of this machine at which metrics of the weight syncs are served; `None` serves none.
    prometheus_address: address of this machine at which that port is open. Everybody who can reach it can read the metrics.
    """

    console: bool = True
    tensorboard: bool = False
    prometheus_port: Annotated[int, Range(0, 65535)] | None = None
    prometheus_address: str = "127.0.0.1"
    samples: AtLeastZero = 2


@dataclass(frozen=True)
class RunnerConfig:
    """Attributes:
    kind: `local` forks trainer ranks on this machine (or uses those of torchrun); `ray` makes trainer ranks, engines and
        reward workers actors of a Ray cluster.
    restarts: how often the run goes on from its last checkpoint after a trainer rank was lost. It ends earlier if the same
        failure happens twice at the same step.
    address: the address of a Ray cluster; `None` starts a cluster on this machine.
    placement: on Ray, whether engines share the trainer's devices or have their own.
    cpus_per_rank, cpus_per_engine: CPUs that Ray reserves.
    threads: torch's threads on a CPU, per trainer rank.
    """

    kind: Literal["local", "ray"] = "local"
    restarts: AtLeastZero = 0
    address: str | None = None
    placement: Literal["colocated", "separate"] = "separate"
    cpus_per_rank: NotNegative = 1.0
    cpus_per_engine: NotNegative = 1.0
    threads: Threads = 1


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run.

    Attributes:
        steps: most training steps.
        stop_at_accuracy: the run ends when a greedy evaluation reaches this accuracy.
        run_dir: the folder for metrics, checkpoints, logs and the report.
    """

    model: ModelConfig
    run_dir: Path
    steps: AtLeastZero = 100
    seed: Seed = 0
    stop_at_accuracy: float | None = None
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    lora: LoRAConfig | None = None
    algorithm: GRPOConfig = field(default_factory=GRPOConfig)
    warm_up: WarmUpConfig = field(default_factory=WarmUpConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)

    def __post_init__(self) -> None:
        if problems := list(_contradictions(self)):
            raise ConfigError("\n".join(problems))

    @property
    def is_toy(self) -> bool:
        return self.model.path.startswith(TOY)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the trainer's parameters."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.model.dtype]

    @property
    def max_staleness(self) -> int:
        """The largest staleness of a token in steps, as the mode determines it."""
        return {"sync": 0, "one-step-off": 1, "async": self.rollout.max_staleness}[self.rollout.mode]

    @property
    def engine_dtype(self) -> str:
        return self.engine.dtype or {"fp32": "float32", "bf16": "bfloat16"}[self.model.dtype]


def load_run_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Reads a recipe from a YAML file and applies overrides (`section.field=value`).

    Raises:
        ConfigError: fields are wrong or contradict each other; the message names all of them.
    """
    return read_config(RunConfig, path, overrides)


def _contradictions(config: RunConfig) -> list[str]:
    """Messages about all fields of several sections that contradict each other."""
    rollout, engine, task, reward = config.rollout, config.engine, config.task, config.reward
    checks = {
        "rollout.stop must not hold an empty text, which every turn ends with": "" in rollout.stop,
        f"trainer.temperature={config.trainer.temperature:g} is not rollout.temperature={rollout.temperature:g}: set the "
        "rollout's only": config.trainer.temperature not in (1.0, rollout.temperature),
        f"rollout.max_tokens={rollout.max_tokens} leaves no room for a prompt in engine.max_model_len={engine.max_model_len}": (
            rollout.max_tokens >= engine.max_model_len
        ),
        f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and rollout.max_tokens={rollout.max_tokens} are more than "
        f"engine.max_model_len={engine.max_model_len}": (
            rollout.max_prompt_tokens is not None and rollout.max_prompt_tokens + rollout.max_tokens > engine.max_model_len
        ),
        "rollout.mode=async with rollout.max_staleness=0 is rollout.mode=sync: say that, or allow a staleness": (
            rollout.mode == "async" and rollout.max_staleness < 1
        ),
        f"algorithm.mini_batches={config.algorithm.mini_batches} are more than rollout.prompts_per_step="
        f"{rollout.prompts_per_step}: a group is not cut": config.algorithm.mini_batches > rollout.prompts_per_step,
        "rollout.max_turns needs rollout.environment: without one there is a single turn": (
            rollout.max_turns > 1 and rollout.environment is None
        ),
        f"task.kind={task.kind} needs task.dataset": task.kind != "sums" and not task.dataset,
        "task.system needs task.chat": task.system is not None and not task.chat,
        "stop_at_accuracy needs task.evaluate_every": config.stop_at_accuracy is not None and not task.evaluate_every,
        "runner.restarts needs checkpoint.every: a lost rank can only go on from a checkpoint": (
            config.runner.restarts > 0 and not config.checkpoint.every
        ),
        f"model.path={config.model.path}: toy models are {', '.join(TOY + name for name in toy.MODELS)}": (
            config.is_toy and config.model.path.removeprefix(TOY) not in toy.MODELS
        ),
        "model.toy is for models named toy:...": config.model.toy is not None and not config.is_toy,
        f"reward.function={reward.function}: a service computes its rewards itself, so reward.workers must be 0": (
            reward.function.startswith(("http://", "https://")) and reward.workers > 0
        ),
        f"trainer.offload={config.trainer.offload} needs rollout.mode=sync: in {rollout.mode} the trainer works while engines "
        "sample": config.trainer.offload != "none" and rollout.mode != "sync",
        "trainer.offload is for engines on the trainer's devices: runner.placement=separate gives them their own": (
            config.trainer.offload != "none" and config.runner.kind == "ray" and config.runner.placement == "separate"
        ),
        "sync.adapters needs a lora section: there is nothing else that could travel": config.sync.adapters and not config.lora,
        "sync.adapters: vLLM has no DoRA; leave sync.adapters out, so that merged weights travel": (
            config.sync.adapters and config.lora is not None and config.lora.dora
        ),
        f"sync.adapters: vLLM takes adapters of rank {MAX_ADAPTER_RANK} at most, not "
        f"{config.lora and config.lora.largest_peft_rank}; leave sync.adapters out, so that merged weights travel": (
            config.sync.adapters and config.lora is not None and config.lora.largest_peft_rank > MAX_ADAPTER_RANK
        ),
        "runner.address is for runner.kind=ray": config.runner.address is not None and config.runner.kind != "ray",
    }
    return range_problems(config) + [text for text, wrong in checks.items() if wrong] + _problems_of_lora(config.lora)


def _problems_of_lora(lora: LoRAConfig | None) -> list[str]:
    try:
        if lora is not None:
            lora.require_valid()
    except ValueError as error:
        return [f"lora: {error}"]
    return []
