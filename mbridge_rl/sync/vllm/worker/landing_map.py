"""The part of each announced HF tensor that one vLLM worker holds, and the check that tensors and parameters fit each other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mbridge_rl.core.errors import EngineMismatch, listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.payload.landing import times_covered
from mbridge_rl.sync.payload.messages import WorkerDescription
from mbridge_rl.sync.worker.tracer import Trace, is_narrower, parameters_and_buffers, trace_load_weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class LandingMap:
    """The landings of every announced tensor on this worker.

    Attributes:
        tensors: the announced tensors, by `hf_name`.
        landings: where each tensor's elements go, by `hf_name`; empty for a tensor that other workers hold.
        untraceable: the reasons why landings are unknown, by `hf_name`. These tensors go to the engine's own loader, each as a
            complete tensor, and only their received bytes are proven.
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
        """Traces the model's loader and checks that announced tensors and parameters fit each other.

        Args:
            model: the worker's model.
            tensors: the announced tensors.
            optional: names of tensors for which the model may have no place.
            device: the device of the model.
            vllm_config: the engine's config.

        Raises:
            EngineMismatch: as `Receiver.describe`.
        """
        trace = trace_load_weights(model, tensors, device)
        rejected = {hf_name: reason for hf_name, reason in trace.rejected.items() if hf_name not in optional}
        trace = replace(trace, rejected=rejected)
        landing_map = cls(tensors, trace, parameters_and_buffers(model))
        if device.type == "cpu":
            _require_fit(model, landing_map, trace, optional, vllm_config)
        else:
            landing_map.untraceable |= _unknown_layouts(model, landing_map, trace)
        for hf_name, reason in landing_map.untraceable.items():
            logger.warning("%s: only its received bytes are verified, not the live weights: %s", hf_name, reason)
        return landing_map

    def description(
        self, rank: int, size: int, host: str, parameters: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> WorkerDescription:
        """The description of this worker from which a plan is made."""
        landings = {hf_name: parts for hf_name, parts in self.landings.items() if parts and hf_name not in self.untraceable}
        written = {part.parameter_name for parts in landings.values() for part in parts}
        written_parameters = {name: parameter for name, parameter in parameters.items() if name in written}
        return WorkerDescription(rank, size, host, written_parameters, landings, self.untraceable)

    def unused(self) -> list[str]:
        """Complaints about regions of tensors that land nowhere, because loaders cut tensors that are too large silently."""
        problems = []
        for hf_name, landings in self.landings.items():
            coverage = times_covered((landing.source for landing in landings), self.tensors[hf_name].shape)
            if landings and coverage.gap is not None:
                problems.append(f"{hf_name}{coverage} is used by no parameter of the engine")
        return problems

    def narrowed(self) -> dict[str, str]:
        """The tensors that land in a parameter whose dtype cannot hold their values, with the reason."""
        reasons = {}
        for hf_name, landings in self.landings.items():
            dtype = self.tensors[hf_name].dtype
            for parameter_dtype in {self._dtypes[landing.parameter_name] for landing in landings}:
                if is_narrower(parameter_dtype, dtype):
                    reasons[hf_name] = f"the trainer sends {dtype}, the engine holds {parameter_dtype}"
        return reasons


def _holds_everything(vllm_config: VllmConfig) -> bool:
    """Whether each worker holds a part of every tensor (with pipeline or expert parallelism it does not)."""
    parallel = vllm_config.parallel_config
    return parallel.pipeline_parallel_size == 1 and not parallel.enable_expert_parallel


def _require_fit(
    model: nn.Module, landing_map: LandingMap, trace: Trace, optional: frozenset[str], vllm_config: VllmConfig
) -> None:
    """Checks that announced tensors and parameters fit each other.

    Raises:
        EngineMismatch: they do not; names everything that is wrong.
    """
    problems = [f"{hf_name}: the engine's loader refuses it: {reason}" for hf_name, reason in _short(trace.rejected)]
    problems += [f"{hf_name}: {reason}; export in the engine's dtype" for hf_name, reason in landing_map.narrowed().items()]
    if _holds_everything(vllm_config):
        problems += [
            f"{hf_name}: the engine's loader ignores it"
            for hf_name, landings in landing_map.landings.items()
            if not landings
            and hf_name not in trace.rejected
            and hf_name not in landing_map.untraceable
            and hf_name not in optional
        ]
        if vllm_config.parallel_config.tensor_parallel_size == 1:
            problems += landing_map.unused()
    if not trace.rejected and not landing_map.untraceable:
        problems += _uncovered(model, landing_map, trace)
    if problems:
        raise EngineMismatch(
            f"{type(model).__name__} in the engine does not fit the trainer's tensors. {'; '.join(problems[:16])}"
        )


def _short(reasons: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return ((hf_name, reason.partition(" The available parameters")[0][:300]) for hf_name, reason in reasons.items())


def _uncovered(model: nn.Module, landing_map: LandingMap, trace: Trace) -> list[str]:
    """Complaints about parameters, or regions of them, that no announced tensor fills. Zero-filled padding counts as filled."""
    filled = {name: list(views) for name, views in trace.filled.items()}
    for landings in landing_map.landings.values():
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
    """The parameters with which the model was built; MLA, for example, adds parameters that it computes after loading."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    built_with = {prefix: get_layerwise_info(module).restore_metadata[0] for prefix, module in model.named_modules()}
    recorded = any(built_with.values())  # vLLM records them for all modules at once
    for name, parameter in model.named_parameters():
        prefix, _, own_name = name.rpartition(".")
        if not recorded or own_name in built_with[prefix]:
            yield name, parameter


def _unknown_layouts(model: nn.Module, landing_map: LandingMap, trace: Trace) -> dict[str, str]:
    """The tensors on an accelerator whose live layout a kernel chooses, so that their landings are unknown, with the reason.

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
    reasons |= landing_map.narrowed()
    for hf_name, landings in landing_map.landings.items():
        if experts and any(landing.parameter_name.startswith(experts) for landing in landings):
            reasons[hf_name] = "the layout of expert weights is its kernel's own"
        elif not landings and not trace.complete:
            reasons.setdefault(hf_name, "the trace stopped before it")
    return reasons
