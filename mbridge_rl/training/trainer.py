"""The Megatron trainer: from a batch and a loss to updated weights, over every parallel axis.

The loss of a step is `sum over all tokens of the batch / number of tokens of the batch`, whatever the micro-batches, data or
context parallelism: each micro-batch contributes its own sum, already divided by the global count, times what Megatron will
divide it by again (`_gradient_factor`).

All ranks hold the same `Batch` and call every method together; each trains on its share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.context_parallel import context_parallel_positions
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.megatron.runtime import megatron_runtime
from mbridge_rl.training.batch import Batch
from mbridge_rl.training.grpo import TokenLoss
from mbridge_rl.training.logprobs import DEFAULT_MAX_ELEMENTS, TokenStatistics, token_statistics
from mbridge_rl.training.lora import adapted_modules, adapters_disabled
from mbridge_rl.training.reference import ReferenceSnapshot

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerConfig:
    """Attributes:
    learning_rate: of Adam; `MegatronTrainer.set_learning_rate` changes it.
    betas, epsilon, weight_decay: of Adam.
    clip_grad: largest global gradient norm; 0 does not clip.
    micro_batch_size: rows that go through the model at once. Bit-equal log-probabilities need equal sizes.
    distributed_optimizer: shard Adam's state over data parallel ranks.
    overlap_grad_reduce: reduce gradients during the backward pass.
    temperature: that the engine samples with; log-probabilities are of that distribution.
    max_logit_elements: see `logprobs.token_statistics`.
    """

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    micro_batch_size: int = 8
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    temperature: float = 1.0
    max_logit_elements: int = DEFAULT_MAX_ELEMENTS


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step saw; the same on every rank.

    Attributes:
        loss: mean over the batch's tokens.
        grad_norm: global, before clipping; 0 where clipping is off.
        tokens: that the loss counted.
        updated: false where the optimizer skipped the step (fp16 overflow).
        statistics: of the policy before the update, `[batch, seq]` each.
    """

    loss: float
    grad_norm: float
    tokens: int
    updated: bool
    statistics: TokenStatistics


class MegatronTrainer:
    """Trains Megatron-core chunks on batches of token sequences.

    Args:
        model: this rank's chunks from `build_model`, with weights and, if wanted, adapters; they are wrapped into Megatron's
            `DistributedDataParallel` here unless they are already.
        config: of the optimizer and of the split into micro-batches.

    Raises:
        ValueError: the chunks are not from `build_model`.

    Attributes:
        model: the wrapped chunks; hand these to `WeightSync` and `AutoBridge`.
        layout: the layout they were built for.
    """

    def __init__(self, model: Sequence[nn.Module], config: TrainerConfig | None = None) -> None:
        self.config = config or TrainerConfig()
        core = unwrap(model)
        if not hasattr(core[0], "parallel_layout"):
            raise ValueError("the trainer needs chunks that know their layout: build them with AutoBridge.build_model")
        self.layout: ParallelLayout = core[0].parallel_layout
        self._vocab_size = core[0].model_spec.vocab_size
        self._device = next(core[0].parameters()).device
        self._reference: ReferenceSnapshot | None = None
        with megatron_runtime():
            self.model = _distributed(model, self.config)
            self.optimizer = _optimizer(self.model, self.config)
            _connect(self.model, self.optimizer)

    def step(self, batch: Batch, loss: TokenLoss) -> StepReport:
        """One optimizer step on the whole batch.

        Args:
            loss: of every token of a micro-batch, differentiable in the statistics that it is given.

        Raises:
            ValueError: no token of the batch counts.
        """
        if batch.num_tokens == 0:
            raise ValueError("no token of the batch is in its mask: there is nothing to train on")
        with megatron_runtime():
            for chunk in self.model:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            statistics, losses = self._run(batch, loss)
            updated, grad_norm, _ = self.optimizer.step()
        mean_loss = (torch.where(batch.mask, losses.double(), 0.0).sum() / batch.num_tokens).item()
        return StepReport(mean_loss, float(grad_norm or 0.0), batch.num_tokens, bool(updated), statistics)

    def compute_log_probs(self, batch: Batch) -> TokenStatistics:
        """What the policy says of the batch's targets, `[batch, seq]` on every rank, without training.

        Bit-equal to what `step` sees if the weights are, in fp32 and bf16 alike: the same micro-batches take the same way.
        """
        with megatron_runtime(), torch.no_grad():
            for chunk in self.model:
                chunk.eval()
            return self._run(batch, None)[0]

    def snapshot_reference(self) -> None:
        """Makes the present weights the reference policy. A LoRA run needs no copy: its reference is the base model."""
        if not self._has_adapters:
            self._reference = ReferenceSnapshot(self.model)

    def reference_log_probs(self, batch: Batch) -> Tensor:
        """Log-probabilities `[batch, seq]` of the reference policy.

        Raises:
            ValueError: `snapshot_reference` was not called.
        """
        with self._reference_policy():
            return self.compute_log_probs(batch).log_probs

    def set_learning_rate(self, learning_rate: float) -> None:
        """From the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @property
    def _has_adapters(self) -> bool:
        return next(adapted_modules(self.model), None) is not None

    def _reference_policy(self) -> AbstractContextManager[None]:
        if self._has_adapters:
            return adapters_disabled(self.model)
        if self._reference is None:
            raise ValueError("there is no reference policy: call snapshot_reference() before training")
        return self._reference.in_place_of(self.model)

    def _run(self, batch: Batch, loss: TokenLoss | None) -> tuple[TokenStatistics, Tensor]:
        """Forward, and with a loss backward and gradient reduction; statistics and per-token losses of the whole batch."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        share = _Share.of(batch, self.layout, self.config.micro_batch_size)
        results = torch.zeros(4, *share.padded.tokens.shape, device=self._device)
        factor = self._gradient_factor(share.num_micro_batches) / max(batch.num_tokens, 1)

        def forward_step(micro_batches: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            index = next(micro_batches)
            micro = share.micro_batch(index).to(self._device)
            logits = chunk(micro.tokens, micro.position_ids, None)

            def compute_loss(logits: Tensor, non_loss_data: bool = False) -> Any:
                policy = self._statistics(logits, micro)
                losses = torch.zeros_like(policy.log_probs) if loss is None else loss(policy, micro)
                share.write(results, index, policy, losses.detach())
                if non_loss_data:
                    return None
                return torch.where(micro.mask, losses, 0.0).sum() * factor, {}

            return logits, compute_loss

        interleaved = self.layout.vpp > 1
        iterators = [iter(range(share.num_micro_batches)) for _ in self.model]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.model if interleaved else self.model[0],
            num_microbatches=share.num_micro_batches,
            seq_length=share.padded.tokens.shape[1],
            micro_batch_size=self.config.micro_batch_size,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        whole = _everywhere(results)[:, : len(batch), : batch.tokens.shape[1]].to(batch.tokens.device)
        return TokenStatistics(whole[0], whole[1], whole[2] > 0), whole[3]

    def _statistics(self, logits: Tensor, micro: Batch) -> TokenStatistics:
        from megatron.core import parallel_state

        return token_statistics(
            logits,
            micro.need("targets"),
            self._vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
            temperature=self.config.temperature,
            max_elements=self.config.max_logit_elements,
        )

    def _gradient_factor(self, num_micro_batches: int) -> float:
        """What undoes Megatron's scalings, so that the gradient is that of the plain sum of all micro-batches' losses.

        The schedule turns a loss into `loss * cp / num_micro_batches` (`schedules.forward_step_calc_loss`, two return values),
        and DDP divides the gradients by `dp * cp` before it sums them (unless `calculate_per_token_loss`).
        """
        layout, config = self.layout, unwrap(self.model)[0].config
        averaged_by_ddp = 1 if config.calculate_per_token_loss else layout.dp * layout.cp
        return num_micro_batches / layout.cp * averaged_by_ddp


@dataclass(frozen=True)
class _Share:
    """One rank's part of a batch: rows by data parallelism, positions by context parallelism, then micro-batches.

    Attributes:
        padded: the whole batch, filled up so that everything divides; what is added has no mask.
        first_row: of this rank's rows.
        columns: this rank's positions.
    """

    padded: Batch
    first_row: int
    micro_batch_size: int
    num_micro_batches: int
    columns: Tensor

    @classmethod
    def of(cls, batch: Batch, layout: ParallelLayout, micro_batch_size: int) -> _Share:
        rows, length = batch.tokens.shape
        at = layout.coordinates(dist.get_rank())
        # Interleaved stages need whole rounds of pp micro-batches.
        multiple = micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
        length += -length % math.lcm(layout.cp * layout.tp, 2 * layout.cp if layout.cp > 1 else 1)
        padded = batch.padded(rows + -rows % multiple, length)
        per_rank = len(padded) // layout.dp
        columns = context_parallel_positions([0, length], at.cp, layout.cp) if layout.cp > 1 else torch.arange(length)
        return cls(padded, at.dp * per_rank, micro_batch_size, per_rank // micro_batch_size, columns)

    def micro_batch(self, index: int) -> Batch:
        return self.padded.rows(self._rows(index)).positions(self.columns)

    def write(self, results: Tensor, index: int, policy: TokenStatistics, losses: Tensor) -> None:
        """This micro-batch's place in `results [4, batch, seq]`: log-probabilities, entropy, greedy, loss."""
        rows = torch.stack([policy.log_probs.detach(), policy.entropy.detach(), policy.greedy.float(), losses.float()])
        results[:, self._rows(index)] = results[:, self._rows(index)].index_copy(2, self.columns.to(rows.device), rows)

    def _rows(self, index: int) -> slice:
        start = self.first_row + index * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


def _everywhere(results: Tensor) -> Tensor:
    """Each rank of the last pipeline stage wrote its share and left the rest zero: sum the shares, tell the other stages."""
    from megatron.core import parallel_state

    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        dist.all_reduce(results, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(results, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return results


def _distributed(model: Sequence[nn.Module], config: TrainerConfig) -> list[nn.Module]:
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


def _optimizer(model: list[nn.Module], config: TrainerConfig) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    transformer = unwrap(model)[0].config
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
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


def _connect(model: list[nn.Module], optimizer: Any) -> None:
    """Tells the schedules, which read these from the model's config, what to do with gradients."""
    from megatron.core.distributed import finalize_model_grads

    for chunk in unwrap(model):
        transformer = chunk.config
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = optimizer.scale_loss if transformer.fp16 else None
        overlapped = [chunk.no_sync for chunk in model] if model[0].ddp_config.overlap_grad_reduce else None
        transformer.no_sync_func = overlapped[0] if overlapped and len(overlapped) == 1 else overlapped
