"""Routing that vLLM computes on a CPU as it does on a GPU.

vLLM's router for CPUs, where experts are not grouped, passes over the bias that only choosing sees (ERNIE 4.5) and fails at
sigmoid scores (MiniMax-M2). Its function for groups knows both: one group of all experts, of which one is chosen, is the same.
For engines whose weight-transfer backend is "mbridge", and for no other engine in the process.
"""

from __future__ import annotations

from typing import Any

from mbridge_rl.sync.vllm.worker.cpu_weights import is_refittable


def install() -> None:
    """Put the cure into the router's constructor; idempotent."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    construct = CPURouter.__init__
    if getattr(construct, "_mbridge", False):
        return

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **options)
        beyond_softmax = self.e_score_correction_bias is not None or self.scoring_func == "sigmoid"
        grouped = self.use_grouped_topk or self.custom_routing_function is not None or self.scoring_func == "sqrtsoftplus"
        if beyond_softmax and not grouped and is_refittable():
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    __init__._mbridge = True  # type: ignore[attr-defined]
    CPURouter.__init__ = __init__
