"""NeMo-RL's ends on gloo Megatron ranks, driven as its driver does it. NeMo-RL's package refuses the Transformers that is here,
so its base class is a stand-in; this was run with the original file of it, too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live import raised
from ranks import run_ranks
from safetensors.torch import load_file
from standin import SIZES, StandInEngine, served
from tiny import tiny_checkpoint

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.integrations.megatron_bridge import AutoBridge
from mbridge_rl.megatron.parallel import initialize_parallel

if importlib.util.find_spec("nemo_rl") is None:
    sys.path.append(str(Path(__file__).parents[1] / "support" / "stub_frameworks"))

LAYOUT = ParallelLayout(tp=2)


class WorkerGroup:
    """One rank's end of NeMo-RL's: every rank runs the same driver, and each calls its own worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def run_all_workers_single_data(self, method_name: str, **kwargs: Any) -> list[Any]:
        return [getattr(self._worker, method_name)(**kwargs)]


class Policy:
    def __init__(self, worker: Any) -> None:
        self.worker_group = WorkerGroup(worker)


def driven(rank: int, directory: Path) -> dict[str, Any]:
    from mbridge_rl.integrations.nemo_rl import MBridgeSynchronizer, RefitMixin

    class Worker(RefitMixin):
        """The part of `MegatronPolicyWorkerImpl` that the mixin relies on."""

        def __init__(self) -> None:
            self.dtype, self.cfg = torch.float32, {"generation": {"vllm_cfg": {"kv_cache_dtype": "auto"}}}
            self.megatron_bridge = AutoBridge.from_hf_pretrained(directory)
            provider = self.megatron_bridge.to_megatron_provider()
            provider.tensor_model_parallel_size = 2
            provider.apply_overrides_and_finalize(dtype=torch.float32)
            (self.model,) = provider.provide_distributed_model(wrap_with_ddp=False)

    initialize_parallel(LAYOUT)
    worker, engine = Worker(), StandInEngine()
    info = worker.prepare_refit_info()
    exported = worker.megatron_bridge.export_hf_weights(
        [worker.model], show_progress=False, conversion_tasks=worker.refit_conversion_tasks
    )
    results: dict[str, Any] = {
        "info": list(info.items()),
        "exported": [(name, (tensor.shape, tensor.dtype)) for name, tensor in exported],
        "early": raised(lambda: worker.mbridge_sync(1)),
    }
    synchronizer = MBridgeSynchronizer(Policy(worker), lambda: [engine], {"timeout": 10.0}, collect=list)
    stale = [synchronizer.is_stale]
    synchronizer.init_communicator()
    results["numbers"] = synchronizer.sync_weights()
    stale.append(synchronizer.is_stale)
    results["served"] = engine.generate() if rank == 0 else None
    results["scales"] = raised(lambda: synchronizer.sync_weights(kv_scales={"k": 1.0}))
    next(iter(worker.model.parameters())).data.view(-1)[0] = float("nan")
    results["failed"] = raised(lambda: synchronizer.sync_weights())
    stale.append(synchronizer.is_stale)
    results["served after it"] = engine.generate() if rank == 0 else None
    worker.cfg["generation"]["vllm_cfg"]["kv_cache_dtype"] = "fp8_e4m3"
    results["fp8"] = raised(worker.prepare_refit_info)
    synchronizer.shutdown()
    engine.close()
    return {**results, "stale": stale}


def test_nemo_rl(tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint(tmp_path, "qwen3", seed=3, **SIZES)
    expected = load_file(directory / "model.safetensors")
    ranks = run_ranks(driven, 2, directory, timeout=100)
    for results in ranks:
        assert results["info"] == results["exported"]
        assert dict(results["info"]) == {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
        assert "mbridge_connect comes before mbridge_sync" in results["early"]
        assert results["stale"] == [True, False, True]
        assert "NotOffered: sync_weights does not offer kv_scales" in results["scales"]
        assert results["failed"].startswith("NonFiniteWeights")
        assert "NotOffered: prepare_refit_info knows neither" in results["fp8"]
        assert results["numbers"]["weight_sync/transfer_seconds"] > 0
    assert ranks[0]["served"] == ranks[0]["served after it"] == (1, served(expected))


@pytest.mark.parametrize("module", ["verl", "nemo_rl"])
def test_without_the_framework_the_error_says_so(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"mbridge_rl.integrations.{module}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"mbridge_rl.integrations.{module} is "):
        importlib.import_module(f"mbridge_rl.integrations.{module}")
