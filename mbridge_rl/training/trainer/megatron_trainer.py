"""The Megatron trainer: from a batch and a loss to updated weights, over every parallel axis.

The loss of a step is a sum over all tokens of the batch, each with a weight that is known before the batch is split
(`objectives.aggregation`): micro-batches, packing, data and context parallelism do not change it. A micro-batch contributes its
own sum, multiplied by the factor by which Megatron will divide it again (`_gradient_factor`).

All ranks hold the same `Batch` and call every method together; each trains on its share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.lora.attach import adapters_disabled
from mbridge_rl.megatron.model import unwrap
from mbridge_rl.training.batch import Batch, TokenStatistics
from mbridge_rl.training.objectives.aggregation import token_weights
from mbridge_rl.training.objectives.loss import TokenLoss, WeightedLoss
from mbridge_rl.training.trainer.micro_batches import MicroBatch, Split, pack_rows, split_rows
from mbridge_rl.training.trainer.offload import Offloaded, offloaded
from mbridge_rl.training.trainer.optimization import (
    TrainerConfig,
    connect,
    make_optimizer,
    make_scheduler,
    update,
    wrap_in_ddp,
)
from mbridge_rl.training.trainer.policy import last_hidden_states, refuse_recurrent_layers, statistics_of, turn_off_dropout
from mbridge_rl.training.trainer.reference import ReferenceSnapshot
from mbridge_rl.training.trainer.step_report import Gradients, StepReport

_log = logging.getLogger(__name__)


class MegatronTrainer:
    """Trains Megatron-core chunks on batches of token sequences. The base model's dropout is turned off, since the policy ratio
    must compare the network with itself.

    Args:
        model: this rank's chunks from `build_model`, with weights and, if wanted, adapters; they are wrapped into Megatron's
            `DistributedDataParallel` here unless they are already.
        config: settings of the optimizer and of the split into micro-batches.

    Raises:
        ValueError: the chunks are not from `build_model`, or the config asks for packing and a layer cannot keep packed
            sequences apart.

    Attributes:
        model: the wrapped chunks; give these to `WeightSync` and `AutoBridge`.
        layout: the layout they were built for.
        optimizer, scheduler: Megatron's optimizer and learning-rate scheduler.
    """

    def __init__(self, model: Sequence[nn.Module], config: TrainerConfig | None = None) -> None:
        self.config = config or TrainerConfig()
        core = unwrap(model)
        if not hasattr(core[0], "parallel_layout"):
            raise ValueError("the trainer needs chunks that know their layout: build them with AutoBridge.build_model")
        if self.config.packing:
            refuse_recurrent_layers(core)
        turn_off_dropout(core)
        self.layout: ParallelLayout = core[0].parallel_layout
        self._device = next(core[0].parameters()).device
        self._reference: ReferenceSnapshot | None = None
        self._offloaded = False
        with megatron_runtime():
            self.model = wrap_in_ddp(model, self.config)
            self.optimizer = make_optimizer(self.model, self.config)
            self.scheduler = make_scheduler(self.optimizer, self.config)
            connect(self.model, self.optimizer)

    def step(self, batch: Batch, loss: TokenLoss) -> StepReport:
        """Makes one optimizer step on the whole batch. If the loss or the gradient is not finite nothing changes, and the
        report says so.

        Args:
            loss: the loss of every token of a micro-batch, differentiable in the statistics that it is given.

        Raises:
            ValueError: no token of the batch is in its mask, or a token in the mask has a number that is not finite; nothing
                was changed.
        """
        gradients = self.compute_gradients(batch, loss)
        updated, grad_norm, skipped = False, math.nan, "the loss is not finite"
        if math.isfinite(gradients.loss):
            with megatron_runtime():
                updated, grad_norm = update(self.optimizer, self.scheduler, self.config.clip_grad)
            skipped = "" if updated else "the gradient is not finite"
        if skipped:
            _log.warning("step skipped: %s (loss %s, gradient norm %s)", skipped, gradients.loss, grad_norm)
        return StepReport(
            gradients.loss,
            gradients.tokens,
            gradients.statistics,
            grad_norm,
            self.optimizer.param_groups[0]["lr"],
            updated,
            skipped,
        )

    def compute_gradients(self, batch: Batch, loss: TokenLoss) -> Gradients:
        """Runs the first half of `step`: afterwards every parameter's `main_grad` has the gradient, reduced over its replicas
        (with the distributed optimizer each replica has only its shard of it).

        Raises:
            ValueError: as in `step`.
        """
        self.require_loaded()
        if batch.num_tokens == 0:
            raise ValueError("no token of the batch is in its mask: there is nothing to train on")
        batch.check_finite()
        weights = loss.token_weights(batch.mask) if isinstance(loss, WeightedLoss) else token_weights(batch.mask)
        with megatron_runtime():
            for chunk in self.model:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            statistics, losses = self._run(batch.with_tensors(loss_weights=weights.float()), loss)
        total = torch.where(batch.mask, losses.double() * weights, 0.0).sum().item()
        return Gradients(total, batch.num_tokens, statistics)

    def compute_log_probs(self, batch: Batch) -> TokenStatistics:
        """Computes the policy's statistics of the batch's targets, `[batch, seq]` on every rank, without training; zero outside
        of the mask.

        With equal weights they are bit-equal to the statistics of `step`, in fp32 and bf16 alike, since both run the same
        micro-batches through the same code.
        """
        self.require_loaded()
        if batch.num_tokens == 0:
            nothing = torch.zeros(batch.tokens.shape)
            return TokenStatistics(nothing, nothing, nothing.bool())
        with megatron_runtime(), torch.no_grad():
            for chunk in self.model:
                chunk.eval()
            return self._run(batch, None)[0]

    def snapshot_reference(self) -> None:
        """Makes the present weights the reference policy. A LoRA run needs no copy: its reference policy is the base model."""
        self.require_loaded()
        if not self.has_adapters:
            self._reference = ReferenceSnapshot(self.model)

    def reference_log_probs(self, batch: Batch) -> Tensor:
        """Log-probabilities `[batch, seq]` of the reference policy.

        Raises:
            ValueError: `snapshot_reference` was not called.
        """
        self.require_loaded()
        with self._reference_policy():
            return self.compute_log_probs(batch).log_probs

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the highest learning rate of the schedule, from the next step on."""
        self.scheduler.max_lr = learning_rate
        for group in self.optimizer.param_groups:
            group["max_lr"] = learning_rate
        self.scheduler.step(0)

    @contextmanager
    def offloaded(
        self, *, weights: bool = True, optimizer: bool = True, directory: str | Path | None = None
    ) -> Iterator[Offloaded]:
        """Frees the trainer's memory inside of the block, for an engine that needs it; afterwards everything is back bit for
        bit.

        Gradients are always freed. Weights and optimizer state go to host memory if they are on an accelerator; on a CPU they
        stay unless there is a directory. Sync weights before the block; inside, every use of the trainer raises.

        Args:
            weights, optimizer: whether weights and the optimizer's state are moved, too.
            directory: a directory for files that hold them instead of host memory.

        Yields:
            The numbers of bytes of this rank that are free.

        Raises:
            OSError: the directory cannot be written, or its disk is full; everything is in place.
        """
        self.require_loaded()
        with offloaded(self.model, self.optimizer, weights=weights, moments=optimizer, directory=directory) as freed:
            self._offloaded = True
            try:
                yield freed
            finally:
                self._offloaded = False

    @contextmanager
    def out_of_the_way(self) -> Iterator[None]:
        """Enters `offloaded` as `config.offload` says; does nothing if it is `none`."""
        if self.config.offload == "none":
            yield
            return
        with self.offloaded(directory=None if self.config.offload == "host" else self.config.offload) as freed:
            _log.debug("offloaded: %s", freed)
            yield

    def require_loaded(self) -> None:
        """
        Raises:
            RuntimeError: it is called inside of `offloaded`.
        """
        if self._offloaded:
            raise RuntimeError("the trainer is offloaded: leave the `with trainer.offloaded()` block before you use it")

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, and the base model is frozen."""
        return getattr(unwrap(self.model)[0], "lora_config", None) is not None

    def _reference_policy(self) -> AbstractContextManager[None]:
        if self.has_adapters:
            return adapters_disabled(self.model)
        if self._reference is None:
            raise ValueError("there is no reference policy: call snapshot_reference() before training")
        return self._reference.in_place_of(self.model)

    def split(self, batch: Batch) -> Split:
        """Divides this rank's part of the batch into micro-batches.

        Raises:
            ValueError: a sequence has more tokens than a micro-batch.
        """
        config, rank, length = self.config, dist.get_rank(), batch.tokens.shape[1]
        if config.packing:
            tokens = config.micro_batch_tokens or config.micro_batch_size * (length + -length % (2 * self.layout.cp))
            return pack_rows(batch, self.layout, rank, tokens)
        rows = config.micro_batch_size
        if config.micro_batch_tokens is not None:
            rows = config.micro_batch_tokens // length
            if rows == 0:
                raise ValueError(
                    f"rows have {length} tokens, a micro-batch holds {config.micro_batch_tokens}: raise micro_batch_tokens"
                )
        return split_rows(batch, self.layout, rank, rows)

    def _run(self, batch: Batch, loss: TokenLoss | None) -> tuple[TokenStatistics, Tensor]:
        """Runs the forward pass and, with a loss, the backward pass and the gradient reduction; returns the statistics and the
        per-token losses of the whole batch."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        split = self.split(batch)
        results = torch.zeros(4, *batch.tokens.shape, device=self._device)
        factor = self._gradient_factor(len(split.micro_batches))
        context_group = parallel_state.get_context_parallel_group() if self.layout.cp > 1 else None

        def forward_step(micro_batches: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro_batch = next(micro_batches)
            micro = micro_batch.of(batch, context_group).to(self._device)

            def compute_loss(output: Tensor, non_loss_data: bool = False) -> Any:
                policy = self._statistics(chunk, output, micro)
                losses = torch.zeros_like(policy.log_probs) if loss is None else loss(policy, micro)
                micro_batch.write(results, _recorded(policy, losses))
                if non_loss_data:
                    return None
                return torch.where(micro.mask, losses * micro.need("loss_weights"), 0.0).sum() * factor, {}

            return last_hidden_states(chunk, micro, micro_batch.offsets), compute_loss

        interleaved = self.layout.vpp > 1
        iterators = [iter(split.micro_batches) for _ in self.model]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.model if interleaved else self.model[0],
            num_microbatches=len(split.micro_batches),
            seq_length=split.length,
            micro_batch_size=split.rows,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        log_probs, entropy, greedy, losses = _shared_results(results).to(batch.tokens.device)
        return TokenStatistics(log_probs, entropy, greedy > 0), losses

    def _statistics(self, chunk: nn.Module, output: Tensor, micro: Batch) -> TokenStatistics:
        from megatron.core import parallel_state

        return statistics_of(
            chunk,
            output,
            micro,
            group=parallel_state.get_tensor_model_parallel_group(),
            temperature=self.config.temperature,
            max_elements=self.config.max_logit_elements,
        )

    def _gradient_factor(self, num_micro_batches: int) -> float:
        """The factor that undoes Megatron's scalings, so that the gradient is that of the plain sum of all micro-batches'
        losses.

        The schedule turns a loss into `loss * cp / num_micro_batches` (`schedules.forward_step_calc_loss`, two return values),
        and DDP divides the gradients by `dp * cp` before it sums them (unless `calculate_per_token_loss`).
        """
        layout, config = self.layout, unwrap(self.model)[0].config
        averaged_by_ddp = 1 if config.calculate_per_token_loss else layout.dp * layout.cp
        return num_micro_batches / layout.cp * averaged_by_ddp


def _recorded(policy: TokenStatistics, losses: Tensor) -> Tensor:
    """`[4, rows, seq / cp]`: log-probabilities, entropy, greedy, loss."""
    return torch.stack([policy.log_probs.detach(), policy.entropy.detach(), policy.greedy.float(), losses.detach().float()])


def _shared_results(results: Tensor) -> Tensor:
    """The results of all ranks, on every rank. Each rank of the last pipeline stage wrote its share and left the rest zero: the
    shares are summed, and broadcast to the other stages."""
    from megatron.core import parallel_state

    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        dist.all_reduce(results, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(results, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return results
