"""What one vLLM worker holds of each announced HF tensor, and whether the two fit each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import EngineMismatch, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.engine_side import WorkerDescription
from mbridge_rl.sync.payload.landing import times_covered
from mbridge_rl.sync.vllm.worker.tracer import Trace, is_narrower, parameters_and_buffers, trace_load_weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class LandingMap:
    """The landings of every announced tensor on this worker.

    Attributes:
        tensors: what was announced, by `hf_name`.
        landings: where each tensor's elements go, by `hf_name`; empty for one that other workers hold.
        untraceable: tensors whose landing is unknown, with the reason. They go to the engine's own loader, each as a complete
            tensor, and only their received bytes are proven.
    """

    def __init__(self, tensors: Sequence[HFTensor], trace: Trace, parameters: Mapping[str, Tensor]) -> None:
        self.tensors = {tensor.hf_name: tensor for tensor in tensors}
        self.landings = {hf_name: tuple(trace.landings.get(hf_name, ())) for hf_name in self.tensors}
        self.untraceable = dict(trace.untraceable)
        self._dtypes = {name: tensor.dtype for name, tensor in parameters.items()}

    @classmethod
    def learn(
        cls,
        model: nn.Module,
        tensors: Sequence[HFTensor],
        optional: frozenset[str],
        device: torch.device,
        vllm_config: VllmConfig,
    ) -> LandingMap:
        """Trace the model's loader and check that announced tensors and parameters fit each other.

        Args:
            optional: names of tensors that the model may have no place for.

        Raises:
            EngineMismatch: see `Receiver.prepare`.
        """
        trace = trace_load_weights(model, tensors, device)
        trace = replace(trace, rejected={name: why for name, why in trace.rejected.items() if name not in optional})
        parameters = parameters_and_buffers(model)
        mine = cls(tensors, trace, parameters)
        if device.type == "cpu":
            _require_fit(model, mine, trace, optional, vllm_config)
        else:
            mine.untraceable |= _unknown_layouts(model, mine, trace)
        for hf_name, reason in mine.untraceable.items():
            logger.warning("%s: only its received bytes are verified, not the live weights: %s", hf_name, reason)
        return mine

    def description(
        self, rank: int, size: int, host: str, parameters: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> WorkerDescription:
        """What a plan needs to know of this worker."""
        landings = {hf_name: parts for hf_name, parts in self.landings.items() if parts and hf_name not in self.untraceable}
        written = {part.parameter_name for parts in landings.values() for part in parts}
        kept = {name: found for name, found in parameters.items() if name in written}
        return WorkerDescription(rank, size, host, kept, landings, self.untraceable)

    def unused(self) -> list[str]:
        """Regions of tensors that land nowhere: loaders cut what is too large without a word."""
        problems = []
        for hf_name, landings in self.landings.items():
            coverage = times_covered((landing.source for landing in landings), self.tensors[hf_name].shape)
            if landings and coverage.gap is not None:
                problems.append(f"{hf_name}{coverage} is used by no parameter of the engine")
        return problems

    def narrowed(self) -> dict[str, str]:
        """Tensors that land in a parameter whose dtype cannot hold their values, and why."""
        reasons = {}
        for hf_name, landings in self.landings.items():
            dtype = self.tensors[hf_name].dtype
            for held in {self._dtypes[landing.parameter_name] for landing in landings}:
                if is_narrower(held, dtype):
                    reasons[hf_name] = f"the trainer sends {dtype}, the engine holds {held}"
        return reasons


def _holds_everything(vllm_config: VllmConfig) -> bool:
    """Whether each worker holds some part of every tensor (pipeline and expert parallel ones do not)."""
    parallel = vllm_config.parallel_config
    return parallel.pipeline_parallel_size == 1 and not parallel.enable_expert_parallel


def _require_fit(model: nn.Module, mine: LandingMap, trace: Trace, optional: frozenset[str], vllm_config: VllmConfig) -> None:
    """Raise `EngineMismatch` with everything that is wrong, not just the first of it."""
    problems = [f"{hf_name}: the engine's loader refuses it: {reason}" for hf_name, reason in _short(trace.rejected)]
    problems += [f"{hf_name}: {reason}; export in the engine's dtype" for hf_name, reason in mine.narrowed().items()]
    if _holds_everything(vllm_config):
        problems += [
            f"{hf_name}: the engine's loader ignores it"
            for hf_name, landings in mine.landings.items()
            if not landings and hf_name not in trace.rejected and hf_name not in mine.untraceable and hf_name not in optional
        ]
        if vllm_config.parallel_config.tensor_parallel_size == 1:
            problems += mine.unused()
    if not trace.rejected and not mine.untraceable:
        problems += _uncovered(model, mine, trace)
    if problems:
        raise EngineMismatch(
            f"{type(model).__name__} in the engine does not fit the trainer's tensors. {'; '.join(problems[:16])}"
        )


def _short(reasons: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return ((hf_name, reason.partition(" The available parameters")[0][:300]) for hf_name, reason in reasons.items())


def _uncovered(model: nn.Module, mine: LandingMap, trace: Trace) -> list[str]:
    """Parameters, or regions of them, that no announced tensor fills. Zero-filled padding counts as filled."""
    filled = {name: list(views) for name, views in trace.filled.items()}
    for landings in mine.landings.values():
        for landing in landings:
            filled.setdefault(landing.parameter_name, []).append(landing.target)
    problems = []
    for name, parameter in _checkpoint_parameters(model):
        coverage = times_covered(filled.get(name, []), parameter.shape, parameter.stride())
        padded = getattr(parameter, "weight_loader_numel", parameter.numel()) == parameter.numel() - coverage.missing
        if coverage.gap is not None and parameter.numel() and not (coverage.missing < parameter.numel() and padded):
            problems.append(f"{name}{coverage} of {list(parameter.shape)} is filled by no tensor of the trainer")
    return problems


def _checkpoint_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the model was built with; MLA, for one, adds some that it computes after loading."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    built_with = {prefix: get_layerwise_info(module).restore_metadata[0] for prefix, module in model.named_modules()}
    recorded = any(built_with.values())  # by vLLM, for all modules at once
    for name, parameter in model.named_parameters():
        prefix, _, own_name = name.rpartition(".")
        if not recorded or own_name in built_with[prefix]:
            yield name, parameter


def _unknown_layouts(model: nn.Module, mine: LandingMap, trace: Trace) -> dict[str, str]:
    """On an accelerator: tensors whose live layout the kernels own, so that a landing says nothing about it.

    Raises:
        EngineMismatch: the engine does not know a tensor at all.
    """
    unknown = [hf_name for hf_name, reason in trace.rejected.items() if "no module or parameter named" in reason]
    if unknown:
        raise EngineMismatch(f"{type(model).__name__} in the engine has no place for {listed(unknown)}")
    experts = tuple(
        f"{name}." for name, module in model.named_modules() if hasattr(getattr(module, "quant_method", None), "moe_kernel")
    )
    reasons = {hf_name: f"its place cannot be traced: {reason}" for hf_name, reason in _short(trace.rejected)}
    reasons |= mine.narrowed()
    for hf_name, landings in mine.landings.items():
        if experts and any(landing.parameter_name.startswith(experts) for landing in landings):
            reasons[hf_name] = "the layout of expert weights is its kernel's own"
        elif not landings and not trace.complete:
            reasons.setdefault(hf_name, "the trace stopped before it")
    return reasons
