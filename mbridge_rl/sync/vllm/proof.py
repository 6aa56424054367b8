"""What one worker holds of each HF tensor, and the proof, from the live parameters, that it is what the trainer meant."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mbridge_rl.core.digest import add
from mbridge_rl.core.errors import listed
from mbridge_rl.core.model import HFTensor
from mbridge_rl.sync.engine_side import WorkerDescription
from mbridge_rl.sync.errors import DigestMismatch, EngineMismatch
from mbridge_rl.sync.vllm.landing import times_covered
from mbridge_rl.sync.vllm.tracer import Trace, is_narrower, parameters_and_buffers, trace_load_weights

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class LandingMap:
    """The landings of every announced tensor on this worker.

    Attributes:
        tensors: what was announced, by `hf_name`.
        landings: where each tensor's elements go, by `hf_name`; empty for one that other workers hold.
        untraceable: tensors whose landing is unknown, with the reason. Of these, only the received bytes are proven.
    """

    def __init__(self, tensors: Sequence[HFTensor], trace: Trace, parameters: Mapping[str, Tensor]) -> None:
        self.tensors = {tensor.hf_name: tensor for tensor in tensors}
        self.landings = {hf_name: tuple(trace.landings.get(hf_name, ())) for hf_name in self.tensors}
        self.untraceable = dict(trace.untraceable)
        self._dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
        self._whole: set[str] = set()
        self._parts: dict[str, list[int]] = {}

    @classmethod
    def learn(cls, model: nn.Module, tensors: Sequence[HFTensor], device: torch.device, vllm_config: VllmConfig) -> LandingMap:
        """Trace the model's loader and check that announced tensors and parameters fit each other.

        Raises:
            EngineMismatch: see `Receiver.prepare`.
        """
        trace = trace_load_weights(model, tensors, device)
        parameters = parameters_and_buffers(model)
        mine = cls(tensors, trace, parameters)
        if device.type == "cpu":
            _require_fit(model, mine, trace, vllm_config)
        else:
            mine.untraceable |= _unknown_layouts(model, mine, trace)
        for hf_name, reason in mine.untraceable.items():
            logger.warning("%s: only its received bytes are verified, not the live weights: %s", hf_name, reason)
        mine._whole = {hf_name for hf_name in mine.landings if hf_name not in mine.untraceable and mine._is_whole(hf_name)}
        return mine

    def _is_whole(self, hf_name: str) -> bool:
        """Whether this worker holds each element once, in the HF dtype: its digest is then the trainer's own."""
        tensor, landings = self.tensors[hf_name], self.landings[hf_name]
        if any(self._dtypes[landing.parameter_name] != tensor.dtype for landing in landings):
            return False
        return times_covered((landing.source for landing in landings), tensor.shape).exactly_once

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

    def note_parts(self, hf_name: str, received: Tensor) -> None:
        """Remember the digest of each part that this worker keeps, where it keeps not just the whole tensor once."""
        if hf_name in self._whole or hf_name in self.untraceable:
            return
        received = received.contiguous()
        self._parts[hf_name] = []
        for landing in self.landings[hf_name]:
            values = landing.source.of(received).to(self._dtypes[landing.parameter_name])
            self._parts[hf_name].append(landing.digest(values, self.tensors[hf_name]))

    def prove(self, model: nn.Module, expected: Mapping[str, int]) -> tuple[int, int]:
        """Compare every live landing with what was expected, in place.

        Args:
            expected: the trainer's digest of each tensor.

        Returns:
            How many tensors were proven from live weights, and how many only from the bytes that arrived.

        Raises:
            DigestMismatch: naming the tensors, and the parameters that hold them.
        """
        parameters, wrong = parameters_and_buffers(model), []
        for hf_name, landings in self.landings.items():
            if hf_name in self.untraceable:
                continue
            tensor, whole = self.tensors[hf_name], hf_name in self._whole
            live = [landing.digest(landing.target.of(parameters[landing.parameter_name].data), tensor) for landing in landings]
            if (add(*live) != expected[hf_name]) if whole else (live != self._parts[hf_name]):
                wrong.append(f"{hf_name} (in {listed({landing.parameter_name for landing in landings})})")
        if wrong:
            raise DigestMismatch(f"{len(wrong)} tensors are not in the live weights as they were sent: {listed(wrong)}")
        return len(self.landings) - len(self.untraceable), len(self.untraceable)


def _holds_everything(vllm_config: VllmConfig) -> bool:
    """Whether each worker holds some part of every tensor (pipeline and expert parallel ones do not)."""
    parallel = vllm_config.parallel_config
    return parallel.pipeline_parallel_size == 1 and not parallel.enable_expert_parallel


def _require_fit(model: nn.Module, mine: LandingMap, trace: Trace, vllm_config: VllmConfig) -> None:
    """Raise `EngineMismatch` with everything that is wrong, not just the first of it."""
    problems = [f"{hf_name}: the engine's loader refuses it: {reason}" for hf_name, reason in _short(trace.rejected)]
    problems += [f"{hf_name}: {reason}; export in the engine's dtype" for hf_name, reason in mine.narrowed().items()]
    if _holds_everything(vllm_config):
        problems += [
            f"{hf_name}: the engine's loader ignores it"
            for hf_name, landings in mine.landings.items()
            if not landings and hf_name not in trace.rejected and hf_name not in mine.untraceable
            if not _is_of_prediction_layer(vllm_config, hf_name)
        ]
        if vllm_config.parallel_config.tensor_parallel_size == 1:
            problems += mine.unused()
    if not trace.rejected and not mine.untraceable:
        problems += _uncovered(model, mine, trace)
    if problems:
        raise EngineMismatch(
            f"{type(model).__name__} in the engine does not fit the trainer's tensors. {'; '.join(problems[:16])}"
        )


def _is_of_prediction_layer(vllm_config: VllmConfig, hf_name: str) -> bool:
    """Whether vLLM's loaders pass over it knowingly: a head that speculates would load it."""
    from vllm.model_executor.models.utils import get_spec_layer_idx_from_weight_name

    return get_spec_layer_idx_from_weight_name(vllm_config.model_config.hf_text_config, hf_name) is not None


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
