"""The demonstration behind `mbridge-rl demo`: the toy recipe, which runs like any recipe of `mbridge-rl train` and is then
checked.

The run folder holds the files of every run (`training.run.recipe_run`), `initial/` and `warm/` (the checkpoints before and
after the warm-up) and `report.html`.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.training.rollout import toy
from mbridge_rl.training.run.config import TOY, RunConfig
from mbridge_rl.training.run.config_file import parse_config
from mbridge_rl.training.run.recipe_run import SUMMARY_FILE, run_training
from mbridge_rl.training.run.report import write_report
from mbridge_rl.training.run.run_log import EVALUATION_FILE, METRICS_FILE, read_lines
from mbridge_rl.training.run.setup import require_installed

PROMPTS_PER_STEP = 64
GROUP_SIZE = 16
LORA_RANK = 32
_LEARNING_RATE = {(False, False): 1e-3, (False, True): 1e-3, (True, False): 3e-3, (True, True): 1e-3}  # (LoRA, with experts)


@dataclass(frozen=True)
class DemoOptions:
    """Attributes:
    steps: most steps of GRPO; the run ends earlier when the engine answers nearly all sums greedily.
    """

    run_dir: Path
    model: str = "qwen3"
    tp: int = 2
    pp: int = 1
    ep: int = 1
    lora: bool = False
    steps: int = 200
    seed: int = 0

    @property
    def layout(self) -> ParallelLayout:
        """The layout with undivided experts on every rank of EP, and as much data parallelism as EP needs beyond TP."""
        return ParallelLayout(
            tp=self.tp,
            pp=self.pp,
            ep=self.ep,
            etp=1 if self.model == "qwen3-moe" or self.ep > 1 else None,
            dp=self.ep // math.gcd(self.ep, self.tp),
        )


def demo_config(options: DemoOptions) -> RunConfig:
    """The configuration of the run that the options describe."""
    layout = options.layout
    rows = PROMPTS_PER_STEP * GROUP_SIZE
    learning_rate = _LEARNING_RATE[options.lora, options.model == "qwen3-moe"]
    sections: dict[str, Any] = {
        "model": {"path": f"{TOY}{options.model}", "dtype": "fp32", "toy": {"num_layers": max(2, options.pp)}},
        "run_dir": options.run_dir,
        "steps": options.steps,
        "seed": options.seed,
        "stop_at_accuracy": 0.93,
        "warm_up": {"accuracy": 0.25},
        # One micro-batch per pipeline stage.
        "trainer": {"learning_rate": learning_rate, "micro_batch_size": -(-rows // (layout.dp * layout.pp))},
        "algorithm": {"group_size": GROUP_SIZE, "entropy_coefficient": 0.01},
        "rollout": {"prompts_per_step": PROMPTS_PER_STEP, "max_tokens": toy.ANSWER_TOKENS},
        "engine": {"max_model_len": 16, "max_num_seqs": rows, "kv_cache_bytes": 1 << 26},
        "task": {"kind": "sums", "order": "unsolved-first", "evaluate_every": 5},
    }
    if options.lora:
        sections["lora"] = {"rank": LORA_RANK, "alpha": 2 * LORA_RANK, "seed": options.seed}
    sections["layout"] = {axis: getattr(layout, axis) for axis in ("tp", "pp", "ep", "etp", "dp")}
    return parse_config(RunConfig, sections)


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Runs the demonstration and returns the content of `summary.json`. It replaces a demonstration that the folder may hold.

    Raises:
        LayoutError, ValueError: the options do not fit the model; nothing was started.
        ImportError: vLLM is missing.
        LaunchError: a rank failed.
    """
    config = demo_config(options)
    require_installed(config)
    for name in ("initial", "warm", "final"):
        shutil.rmtree(options.run_dir / name, ignore_errors=True)
    for path in options.run_dir.glob("*.jsonl"):
        path.unlink()
    run = run_training(config)
    history = read_lines(options.run_dir / METRICS_FILE)
    accuracies = [line["accuracy"] for line in history if line["accuracy"] is not None]
    summary = {
        "model": options.model,
        "layout": str(options.layout),
        "lora": options.lora,
        "seed": options.seed,
        "warmup_steps": run["warm_up_steps"],
        "warmup_accuracy": run["accuracy_before"],
        "final_accuracy": accuracies[-1] if accuracies else run["accuracy_before"],
        "steps": len(history),
        "syncs": len(history) + 1,
        "digest_mismatches": run["unverified_syncs"],
        "first_ratio_max_deviation": history[0]["ratio_max_deviation"] if history else None,
        "mismatch_max": max((line["mismatch_max"] for line in history), default=None),
        "refit_ms_median": round(statistics.median(line["refit_ms"] for line in history), 2) if history else None,
        "hf_equals_vllm": _transformers_agrees(options.run_dir),
        "seconds": run["seconds"],
    }
    (options.run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    write_report(options.run_dir)
    return summary


def _transformers_agrees(run_dir: Path) -> bool:
    """Whether Transformers with the saved checkpoint answers every sum as the engine did in its last evaluation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    evaluation = read_lines(run_dir / EVALUATION_FILE)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final", trust_remote_code=False)
    with toy.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(run_dir / "final", dtype=torch.float32, trust_remote_code=False).eval()
    prompts = torch.tensor([tokenizer.encode(line["prompt"]) for line in evaluation])
    answers = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=toy.ANSWER_TOKENS
    )[:, prompts.shape[1] :]
    texts = [tokenizer.decode(answer).split(toy.EOS)[0] for answer in answers]
    return texts == [line["completion"] for line in evaluation]
