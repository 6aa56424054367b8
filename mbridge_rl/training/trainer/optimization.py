"""Sets up Megatron's DDP, optimizer and learning-rate schedule for a model, from one config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from mbridge_rl.core.typed_values import AtLeastOne, NotNegative, Positive, Range, range_problems
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.training.trainer.logprobs import DEFAULT_MAX_ELEMENTS

Schedule = Literal["constant", "linear", "cosine", "inverse-square-root"]
Beta = Annotated[float, Range(least=0.0, below=1.0)]


@dataclass(frozen=True)
class TrainerConfig:
    """Attributes:
    learning_rate: Adam's highest learning rate in the schedule; `MegatronTrainer.set_learning_rate` changes it.
    schedule: the schedule of the learning rate after the warm-up. Step `n` of `warmup_steps` has `n / warmup_steps` of the
        learning rate; it then falls until `decay_steps` (counted from the beginning) to `min_learning_rate`, or stays.
    betas, epsilon, weight_decay: Adam's settings.
    clip_grad: largest global gradient norm; 0 does not clip.
    micro_batch_size: rows that go through the model at once. Bit-equal log-probabilities need equal sizes.
    micro_batch_tokens: instead of a number of rows, the number of tokens that go through the model at once: as many padded rows
        as fit or, with packing, sequences with so many tokens in all.
    packing: pack sequences one after the other (Megatron's "thd" format) instead of padding rows.
    distributed_optimizer: shard Adam's state over data parallel ranks.
    overlap_grad_reduce: reduce gradients during the backward pass.
    temperature: the engine's sampling temperature; log-probabilities are those of that distribution.
    max_logit_elements: see `logprobs.projected_token_statistics`.
    offload: where weights and optimizer state are while a synchronous run samples and evaluates: `none` leaves them, `host`
        moves them from a GPU into host memory, anything else is a directory (`MegatronTrainer.out_of_the_way`).

    Raises:
        ValueError: values are out of range or contradict each other; the message names them.
    """

    learning_rate: float = 1e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    decay_steps: AtLeastOne | None = None
    min_learning_rate: float = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    clip_grad: float = 1.0
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    packing: bool = False
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    temperature: float = 1.0
    max_logit_elements: int = DEFAULT_MAX_ELEMENTS
    offload: str = "none"

    def __post_init__(self) -> None:
        if problems := range_problems(self):
            raise ValueError("; ".join(problems))
        if self.schedule not in ("constant", "linear", "cosine", "inverse-square-root"):
            raise ValueError(f"unknown schedule {self.schedule!r}: choose constant, linear, cosine or inverse-square-root")
        if self.schedule in ("linear", "cosine") and (self.decay_steps or 0) <= self.warmup_steps:
            raise ValueError(
                f"schedule {self.schedule!r} needs decay_steps={self.decay_steps} beyond warmup_steps={self.warmup_steps}"
            )
        if self.schedule in ("constant", "inverse-square-root") and self.decay_steps is not None:
            raise ValueError(f"schedule {self.schedule!r} does not end, decay_steps={self.decay_steps} would mean nothing")
        if self.warmup_steps < 0 or not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"learning rates must be 0 <= min_learning_rate={self.min_learning_rate} <= learning_rate={self.learning_rate} "
                f"and warmup_steps={self.warmup_steps} not negative"
            )
        for name in ("micro_batch_size", "micro_batch_tokens", "max_logit_elements"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.temperature <= 0 or self.clip_grad < 0:
            raise ValueError(f"temperature={self.temperature} must be positive and clip_grad={self.clip_grad} not negative")


def wrap_in_ddp(model: Sequence[nn.Module], config: TrainerConfig) -> list[nn.Module]:
    """The chunks in Megatron's `DistributedDataParallel`, unless they are already."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    if all(isinstance(chunk, DistributedDataParallel) for chunk in model):
        return list(model)
    transformer = unwrap(model)[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=transformer.bf16 or transformer.fp16,
        overlap_grad_reduce=config.overlap_grad_reduce,
        use_distributed_optimizer=config.distributed_optimizer,
    )
    # Buckets overlap communication with the backward pass, of which only the first chunk's end is exposed.
    return [
        DistributedDataParallel(transformer, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model)
    ]


def make_optimizer(model: list[nn.Module], config: TrainerConfig) -> Any:
    """Megatron's Adam with fp32 masters where the model is in half precision."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    transformer = unwrap(model)[0].config
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.epsilon,
        weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        bf16=transformer.bf16,
        fp16=transformer.fp16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=config.distributed_optimizer,
    )
    return get_megatron_optimizer(optimizer_config, model)


def make_scheduler(optimizer: Any, config: TrainerConfig) -> Any:
    """Megatron's schedule; it is stepped before each optimizer step, so that the first step of a warm-up is not lost."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=config.decay_steps or (1 << 60),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def connect(model: list[nn.Module], optimizer: Any) -> None:
    """Tells the schedules, which read these from the model's config, what to do with gradients."""
    from megatron.core.distributed import finalize_model_grads

    for chunk in unwrap(model):
        transformer = chunk.config
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = optimizer.scale_loss if transformer.fp16 else None
        overlapped = [chunk.no_sync for chunk in model] if model[0].ddp_config.overlap_grad_reduce else None
        transformer.no_sync_func = overlapped[0] if overlapped and len(overlapped) == 1 else overlapped


def update(optimizer: Any, scheduler: Any, clip_grad: float) -> tuple[bool, float]:
    """Makes one step of the schedule and the optimizer; neither moves if the gradient is not finite.

    Returns:
        Whether there was an update, and the global gradient norm before clipping; the same on all ranks.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    overflow = optimizer.prepare_grads()
    norm = math.inf if overflow else float(optimizer.get_grad_norm() or 0.0)
    if not math.isfinite(norm):
        return False, norm
    scheduler.step(1)
    for part in optimizer.chained_optimizers:  # dense and expert parameters
        if clip_grad and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
    return bool(optimizer.step_with_ready_grads()), norm
