"""Gradients as Hugging Face tensors: the export of weights, applied to `main_grad`. Gradients of two layouts, or of Megatron
and Transformers, can then be compared name by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.adapters import adapter_spec
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import hf_side, megatron_side
from mbridge_rl.distributed.group import RankGroup
from mbridge_rl.distributed.stream import TensorStream
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.lora.adapter_side import LiveAdapters, lora_config_of
from mbridge_rl.megatron.parameters import LiveParameters
from mbridge_rl.training.trainer.megatron_trainer import MegatronTrainer


class LiveGradients(LiveParameters):
    """This rank's gradients under the global names of the parameters; zeros for tensors without a gradient (frozen parameters,
    buffers)."""

    def __getitem__(self, megatron_name: str) -> Tensor:
        return _gradient_of(self._parameters[megatron_name])


class LiveAdapterGradients(LiveAdapters):
    """This rank's gradients of the adapters under their global names; zeros for frozen ones."""

    def __getitem__(self, megatron_name: str) -> Tensor:
        return _gradient_of(self.parameter(megatron_name))


def _gradient_of(parameter: Tensor) -> Tensor:
    gradient = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.detach()


def hf_gradients(trainer: MegatronTrainer, bridge: AutoBridge) -> dict[str, Tensor]:
    """The full, unclipped gradients that `trainer.compute_gradients` left, `{hf_name: fp32 tensor}`; with adapters the
    gradients of the adapters, by PEFT name. It is meant for comparisons: all ranks get all gradients.

    Where a bridge adds something to a weight or casts it (a zero-centred norm's `+1`), the gradient is changed in the same way.
    """
    spec, layout, group = bridge.spec, trainer.layout, RankGroup()
    with megatron_runtime():
        _complete(trainer.model)
    experts_before = layout.coordinates(group.rank).ep * (spec.num_experts or 0) // layout.ep
    live: LiveGradients | LiveAdapterGradients
    if trainer.has_adapters:
        live = LiveAdapterGradients(trainer.model, experts_before)
        spec = adapter_spec(spec, lora_config_of(trainer.model))
        plan = compile_plan(spec, megatron_side(spec, layout), hf_side(spec))
    else:
        live = LiveGradients(trainer.model, experts_before, buffer_names=_source_names(bridge, trainer, group.rank))
        plan = bridge.export_plan(layout)
    stream = TensorStream(plan, spec.hf_dtypes(torch.float32), group, device=next(trainer.model[0].parameters()).device)
    try:
        return dict(stream.run(live))
    finally:
        stream.close()


def _source_names(bridge: AutoBridge, trainer: MegatronTrainer, rank: int) -> set[str]:
    plan = bridge.export_plan(trainer.layout)
    return {copy.source.name for copy in plan.copies if copy.source_rank == rank}


def _complete(model: Sequence[nn.Module]) -> None:
    """Gathers the full gradients where the distributed optimizer left each data-parallel rank only the gradient of its
    shard."""
    for chunk in model:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            ranks, group = buffer.data_parallel_world_size, buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.view(ranks, -1)[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
