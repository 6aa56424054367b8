"""A live Transformers module as a side of plans: read and written where Transformers keeps its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from ranks import run_ranks
from tiny import assert_same_state, hf_state, tiny_model
from torch import nn

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core import virtual
from mbridge_rl.core.errors import StateMismatchError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.plan import compile_plan
from mbridge_rl.core.segments import megatron_side
from mbridge_rl.hf.module import HFModule, saved_views
from mbridge_rl.hf.source import open_source
from mbridge_rl.megatron.parallel import initialize_parallel

LIVE = {
    "llama3-tied": ParallelLayout(tp=2),
    "qwen3-moe": ParallelLayout(tp=2, ep=2, etp=1),
    "qwen2-tied": ParallelLayout(pp=2),
}


def saved_state(module: nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """What Transformers itself makes of the module."""
    module.save_pretrained(directory)
    return hf_state(directory)


# What a bridge leaves alone in a checkpoint it would leave alone in a module, too.
FULLY_MAPPED = [variant for variant, family in FAMILIES.items() if not family.ignored]


@pytest.mark.parametrize("variant", FULLY_MAPPED)
def test_a_module_of_every_family_is_its_checkpoint(variant: str, tmp_path: Path) -> None:
    """Sharding the module equals sharding what Transformers saves of it; written back, every parameter has the same bits."""
    family = FAMILIES[variant]
    module = family.model(seed=3)
    module.save_pretrained(tmp_path)
    bridge = AutoBridge.from_pretrained(tmp_path)
    assert bridge.verify(module, tmp_path) == []
    files = dict(open_source(bridge.spec, bridge.hf_config, tmp_path))
    from_module, from_files = (bridge.shard(source, family.layout) for source in (module, files))
    for rank in range(family.layout.world_size):
        assert_same_state(from_module[rank], from_files[rank])
    other = family.model(seed=4)
    target = HFModule(bridge.spec, other)
    virtual.run(compile_plan(bridge.spec, megatron_side(bridge.spec, family.layout), target.side), from_module, {0: target})
    assert_same_state(other.state_dict(), module.state_dict())


CLASSES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "Gemma2": {"head_dim": 16},
}


def random_module(name: str, **changes: Any) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    config = getattr(transformers, f"{name}Config")(**{**sizes, "num_key_value_heads": 2, **CLASSES[name], **changes})
    config.architectures = [f"{name}ForCausalLM"]
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", CLASSES)
def test_views_are_what_transformers_saves(name: str, tmp_path: Path) -> None:
    """The views equal what Transformers saves, whatever it renames, splits or fuses. No knowledge of a family is needed."""
    module = random_module(name)
    expected = saved_state(module, tmp_path)
    tensors = module.state_dict()
    viewed = {}
    for hf_name, saved_view in saved_views(module, tensors).items():
        view = saved_view.view_of_parameter
        viewed[hf_name] = tensors[saved_view.parameter_name].as_strided(view.shape, view.stride(), view.storage_offset())
    assert_same_state({hf_name: viewed[hf_name] for hf_name in expected}, expected)
    assert all(hf_name.startswith("lm_head") for hf_name in viewed.keys() - expected.keys())  # tied: saved once


def there_and_back(rank: int, variant: str, layout: ParallelLayout, receivers: list[int] | None) -> bool:
    """From one module into Megatron and out into another one."""
    initialize_parallel(layout)
    source, target = tiny_model(variant, seed=1), tiny_model(variant, seed=2)
    bridge = AutoBridge.from_config(source.config)
    model = bridge.build_model(layout)
    bridge.load_weights(model, source)
    assert bridge.verify(model, source) == []
    assert bridge.verify(model, target) == sorted(bridge.spec.hf_shapes)
    receives = receivers is None or rank in receivers
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    bridge.export_to_module(model, target if receives else None, ranks=receivers, bucket_bytes=1 << 16)
    assert_same_state(target.state_dict(), source.state_dict() if receives else before)
    target.get_parameter("model.norm.weight").data.view(-1)[3:4].neg_()
    different = bridge.verify(model, target)
    return different == (["model.norm.weight"] if receives else sorted(bridge.spec.hf_shapes))


@pytest.mark.parametrize("receivers", [None, [1]], ids=["all", "one"])
@pytest.mark.parametrize("variant", LIVE)
def test_modules_into_megatron_and_out(variant: str, receivers: list[int] | None) -> None:
    assert run_ranks(there_and_back, LIVE[variant].world_size, variant, LIVE[variant], receivers) == [True] * 2


def refused(rank: int) -> tuple[str, str, bool]:
    initialize_parallel(ParallelLayout(tp=2))
    module = tiny_model("llama")
    bridge = AutoBridge.from_config(module.config)
    model = bridge.build_model()
    bridge.load_weights(model, module)
    with pytest.raises(StateMismatchError) as another:
        bridge.export_to_module(model, module if rank == 0 else tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(StateMismatchError) as none:
        bridge.export_to_module(model, module if rank == 0 else None)
    return str(another.value), str(none.value), bridge.verify(model, module) == []


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    for another, none, unchanged in run_ranks(refused, 2):
        assert "missing model.layers.3" in another
        assert "rank 1 receives and has no module" in none
        assert unchanged


def test_modules_without_data_or_ties() -> None:
    module = tiny_model("llama3-tied")
    spec = AutoBridge.from_config(module.config).spec
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())
    with pytest.raises(StateMismatchError, match=r"lm_head.weight should be tied and is not: call its tie_weights\(\)"):
        HFModule(spec, module)
    with torch.device("meta"), pytest.raises(StateMismatchError, match="holds no data yet"):
        HFModule(spec, type(module)(module.config))


def test_what_is_computed_on_saving_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Chunk

    module = tiny_model("qwen3-moe")
    halves = lambda self, tensors, *_, **__: {name: tensor[0] / 2 for name, tensor in tensors.items()}  # noqa: E731
    monkeypatch.setattr(Chunk, "convert", halves)
    with pytest.raises(UnsupportedModelError, match=r"experts.gate_up_proj by aten.div.Tensor, which is no rearrangement"):
        HFModule(AutoBridge.from_config(module.config).spec, module)
