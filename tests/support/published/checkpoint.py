"""The published configs of `tests/data/published`, and random checkpoints of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families.family import REFERENCE, randomize
from torch import Tensor, nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.hf.config import parse_config
from mbridge_rl.megatron.forward import forward_logits
from mbridge_rl.megatron.parallel import initialize_parallel

DATA = Path(__file__).parents[2] / "data" / "published"
NAMES = sorted(path.stem for path in DATA.glob("*.json"))


def published_config(name: str) -> dict[str, Any]:
    """What config.json of the model `OWNER--NAME` says, in small."""
    return json.loads((DATA / f"{name}.json").read_text())


def checkpoint(config: dict[str, Any], directory: Path, change: Callable[[str, Tensor], None] | None = None) -> nn.Module:
    """Saves a random model of `config` by Transformers' own class, beside the config as it was published, and returns it. The
    weights are not quantized, whatever the published ones are; `change` gets every parameter first, by its name."""
    plain = {field: value for field, value in config.items() if field != "quantization_config"}
    model = _model_class(config["architectures"][0])._from_config(parse_config(plain), **REFERENCE).eval()
    randomize(model, seed=0, embedding=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters() if change else ():
            change(name, parameter)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(plain))
    return model


def _model_class(architecture: str) -> Any:
    import transformers

    if architecture == "DeciLMForCausalLM":
        from families.heterogeneous import DeciLMForCausalLM

        return DeciLMForCausalLM
    return getattr(transformers, architecture)


def exported_and_logits(rank: int, directory: Path, batches: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What a Megatron model of one rank exports, and its logits of every batch."""
    initialize_parallel(ParallelLayout())
    bridge = AutoBridge.from_pretrained(directory)
    model = bridge.build_model(dtype=torch.float32)
    bridge.load_weights(model)
    return dict(bridge.export_weights(model)), [forward_logits(model, tokens) for tokens in batches]
