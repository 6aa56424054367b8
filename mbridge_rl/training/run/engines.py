"""Starts the engines of a run as its recipe describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mbridge_rl.megatron.lora.attach import LoRAConfig
from mbridge_rl.sync.vllm.engines.process import EngineProcess
from mbridge_rl.training.run.config import ADAPTER_RANKS, RunConfig
from mbridge_rl.training.run.setup import model_directory
from mbridge_rl.training.run.warm_up import warmed_up


def engine_directory(config: RunConfig) -> Path:
    """The checkpoint that engines start on. Where only adapters are sent, it has their base weights; otherwise the first sync
    replaces its weights."""
    start_from = model_directory(config)
    return warmed_up(config, start_from) if config.sync.adapters else start_from


def start_engine_process(config: RunConfig, index: int) -> EngineProcess:
    """Starts engine `index` in its own process; returns before it is up."""
    engine = config.engine
    environment = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(engine.threads)}
    return EngineProcess(
        engine_directory(config),
        environment=environment,
        start_timeout=engine.start_timeout,
        call_timeout=engine.call_timeout,
        log_path=config.run_dir / f"engine-{index}.log",
        **engine_arguments(config),
    ).start()


def engine_arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments of an `InProcessEngine`."""
    engine = config.engine
    return {
        "dtype": config.engine_dtype,
        "seed": config.seed,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "kv_cache_bytes": engine.kv_cache_bytes,
        **(_slot_arguments(config.lora) if config.sync.adapters and config.lora is not None else {}),
        **engine.options,
    }


def _slot_arguments(lora: LoRAConfig) -> dict[str, Any]:
    """The engine arguments for two adapter slots: one for the policy, one for rows of the base model."""
    rank = next(rank for rank in ADAPTER_RANKS if rank >= lora.largest_peft_rank)
    return {"enable_lora": True, "max_loras": 2, "max_lora_rank": rank}
