"""Makes vLLM's routing of experts on a CPU equal to its routing on a GPU.

If experts are not grouped, vLLM's router for CPUs ignores the bias that only affects the choice of experts (ERNIE 4.5) and
fails at sigmoid scores (MiniMax-M2). Its function for grouped experts handles both, and one group of all experts, of which one
group is chosen, gives the same routing. This changes engines whose weight-transfer backend is "mbridge", and no other engine in
the process.
"""

from __future__ import annotations

from typing import Any

from mbridge_rl.sync.vllm.versions import cpu_router
from mbridge_rl.sync.vllm.worker.cpu_weights import is_refittable


def install() -> None:
    """Replaces the constructor of the router. Idempotent."""
    router = cpu_router()
    if router is None or getattr(router.__init__, "_mbridge", False):
        return
    construct = router.__init__

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        construct(self, *arguments, **options)
        beyond_softmax = self.e_score_correction_bias is not None or self.scoring_func == "sigmoid"
        grouped = self.use_grouped_topk or self.custom_routing_function is not None or self.scoring_func == "sqrtsoftplus"
        if beyond_softmax and not grouped and is_refittable():
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1

    __init__._mbridge = True  # type: ignore[attr-defined]
    router.__init__ = __init__
