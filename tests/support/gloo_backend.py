"""A backend of vLLM's for CPUs, so that its contract can be run here: `nccl`'s own two ends, over gloo and without streams.

Everything but the broadcast is vLLM's: the order of calls, the check of metadata against iteration, and the layerwise reload.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from standin import light_model
from tiny import hf_state, tiny_checkpoint
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.integrations.vllm_source import MegatronWeightSource, start_trainer
from mbridge_rl.sync.vllm.engines.in_process import InProcessEngine

SIZES = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2}
PROMPTS = [[5, 9, 33, 100, 514], [1, 2, 3]]


@dataclass
class GlooInit(WeightTransferInitInfo):
    port: int = 0


@dataclass
class GlooTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = "gloo"


def group_of(port: int, rank: int) -> Any:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    return dist.ProcessGroupGloo(dist.PrefixStore("native", store), rank, 2, timedelta(seconds=60))


class GlooWorker(NCCLWeightTransferEngine):
    init_info_cls = GlooInit

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        self._group = group_of(init_info.port, 1)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype_name, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype_name))
                self._group.recv([tensor], 0, 0).wait()
                yield name, tensor

        self.model.load_weights(received())


class GlooTrainer(NCCLTrainerWeightTransferEngine):
    init_info_cls = GlooTrainerInit

    @classmethod
    def trainer_init(cls, init_info: GlooTrainerInit, *, client: Any, source: Any = None) -> GlooTrainer:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(client.init_weight_transfer_engine, asdict(GlooInit(engine._server.port)))
            engine._group = group_of(engine._server.port, 0)
            joining.result()
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        for _, tensor in self._checked_iter(source, meta):
            self._group.send([tensor.contiguous()], 1, 0).wait()


class LLMClient:
    """vLLM has clients of this kind for HTTP and Ray."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def a_native_backend_takes_our_source(directory: Path) -> None:
    tiny_checkpoint(directory / "A", "qwen3", seed=0, **SIZES)
    tiny_checkpoint(directory / "B", "qwen3", seed=1, **SIZES)
    with InProcessEngine(directory / "B", max_model_len=64, max_num_seqs=4) as fresh:
        wanted = [answer.tokens for answer in fresh.generate(PROMPTS, temperature=0.0, max_tokens=8)]
    WeightTransferEngineFactory.register_engine("gloo", GlooWorker)
    WeightTransferTrainerFactory.register_engine("gloo", GlooTrainer)
    llm = LLM(
        str(directory / "A"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 26,
        weight_transfer_config=WeightTransferConfig(backend="gloo"),
    )
    parameters = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False)

    def answers() -> list[list[int]]:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, parameters, use_tqdm=False)]

    assert answers() != wanted
    bridge, model = light_model("qwen3", ParallelLayout(), 0, hf_state(directory / "B"), SIZES)
    source = MegatronWeightSource(bridge, model)
    trainer: TrainerWeightTransferEngine = start_trainer(GlooTrainerInit(rank=0), client=LLMClient(llm), source=source)
    trainer.send_weights()
    llm.reset_prefix_cache()
    assert answers() == wanted
    source.close()
