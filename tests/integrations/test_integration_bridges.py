"""The stand-ins of mbridge and Megatron-Bridge, called as verl, SkyRL and slime call the originals, on gloo Megatron ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live import raised
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from tolerance import assert_near, rounding
from transformers import PretrainedConfig

from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.core.lora_config import LoRAConfig
from mbridge_rl.hf.config import load_config
from mbridge_rl.integrations import mbridge, megatron_bridge
from mbridge_rl.megatron.lora.attach import add_lora
from mbridge_rl.megatron.parallel import initialize_parallel

LAYOUT = ParallelLayout(tp=2, pp=2, ep=2, etp=1)
TARGETS = ("q_proj", "o_proj")
SIZES = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
}


def freeze_routers(model: Any, pre_process: bool, post_process: bool, config: Any, hf_config: Any) -> None:
    """As mbridge's own callback does."""
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.weight.requires_grad = False


def make_value_model(model: Any, pre_process: bool, post_process: bool, config: Any, hf_config: Any) -> None:
    if post_process:
        model.output_layer = torch.nn.Linear(config.hidden_size, 1, bias=False)


def equals(named_tensors: Any, expected: dict[str, torch.Tensor]) -> bool:
    state = {name: tensor for name, tensor in named_tensors}
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def as_verl_calls_mbridge(directory: Path, output: Path, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    bridge = mbridge.AutoBridge.from_config(load_config(directory), dtype=torch.float32)
    bridge.set_extra_args(attention_dropout=0.0, moe_aux_loss_coeff=0.25, tensor_model_parallel_size=2)
    config = bridge.config
    config.fp16, config.bf16 = False, False
    config.moe_z_loss_coeff = 0.125  # set on the config, as verl does
    model = bridge.get_model(
        post_model_creation_callbacks=[freeze_routers],
        wrap_with_ddp=True,
        fp16=config.fp16,
        bf16=config.bf16,
        ddp_config={"use_distributed_optimizer": True},
    )
    bridge.load_weights(model, str(directory))
    (output / "mbridge").mkdir(exist_ok=True)
    (output / "mbridge" / "tokenizer.json").write_text("{}")
    (output / "mbridge" / "model-00001-of-00009.safetensors").write_text("of an older save")
    dist.barrier()
    bridge.save_weights(model, str(output / "mbridge"), memory_efficient=True)
    inner = model[0].module
    refused = [
        raised(lambda: bridge.get_model(bf16=False, post_model_creation_callbacks=[make_value_model])),
        raised(lambda: bridge.get_model(use_torch_fsdp2=True)),
        raised(lambda: bridge.set_extra_args(context_parallel_size=2)),
        raised(lambda: bridge.set_extra_args(context_parallel_size=1, no_such_field=2)),
    ]
    return {
        "equal": [equals(bridge.export_weights(model), expected) for _ in range(2)],
        "narrowed": len(list(bridge.export_weights(model).received_by([3]))),
        "config": (inner.config.moe_aux_loss_coeff, inner.config.moe_z_loss_coeff, inner.config.sequence_parallel),
        "frozen": [name for name, parameter in inner.named_parameters() if not parameter.requires_grad],
        "distributed": model[0].ddp_config.use_distributed_optimizer,
        "refused": refused,
    }


def as_verl_calls_megatron_bridge(directory: Path, output: Path, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    bridge = megatron_bridge.AutoBridge.from_hf_pretrained(str(directory), trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=False)
    overrides = SIZES | {
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": True,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": False,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
    }
    provider.apply_overrides_and_finalize(dtype=torch.float32, overrides=overrides)
    provider.register_pre_wrap_hook(lambda chunks: add_lora(chunks, LoRAConfig(rank=4, alpha=8, targets=TARGETS, seed=1)))
    model = provider.provide_distributed_model(wrap_with_ddp=True, ddp_config=None, fp16=provider.fp16, bf16=provider.bf16)
    bridge.load_hf_weights(model, str(directory), allowed_mismatched_params=[])
    for name, parameter in model[0].named_parameters():
        if "lora_b" in name.lower() or name.endswith("B"):
            torch.nn.init.constant_(parameter, 0.01)
    tasks = bridge.get_conversion_tasks(model)
    merged = dict(bridge.export_hf_weights(model, cpu=True, show_progress=False, conversion_tasks=tasks))
    adapters = dict(bridge.export_adapter_weights(model))
    bridge.save_hf_adapter(model, str(output / "adapter"), peft_config=None)
    bridge.save_hf_weights(model, str(output / "merged"), strict=True)
    return {
        "base_equal": equals(bridge.export_hf_weights(model, conversion_tasks=tasks, merge_adapter_weights=False), expected),
        "merged": merged if dist.get_rank() == 0 else {},
        "adapters": adapters if dist.get_rank() == 0 else {},
        "some": [name for name, _ in bridge.export_hf_weights(model, conversion_tasks=tasks[3:5])],
        "tasks": [task.hf_name for task in tasks],
        "read": (provider.num_layers, provider.bf16, hasattr(provider, "no_such_field"), provider.sequence_parallel),
        "bare": type(provider.provide(pre_process=dist.get_rank() < 2)).__name__,
        "built": as_simply_as_can_be(directory, expected),
        "refused": [
            raised(lambda: setattr(provider, "num_layers", 9)),
            raised(lambda: setattr(provider, "no_such_field", 9)),
            raised(lambda: bridge.load_hf_weights(model, None, allowed_mismatched_params=["output_layer.weight"])),
            raised(lambda: provider.provide_distributed_model(use_megatron_fsdp=True)),
            raised(lambda: list(bridge.export_hf_weights(model, conversion_tasks=["model.norm.weight"]))),
        ],
    }


def as_simply_as_can_be(directory: Path, expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The model at once, from a bare config and from a checkpoint, with hooks around the wrapping."""
    hooked: list[str] = []
    bare = megatron_bridge.AutoBridge.from_hf_config(load_config(directory))
    provider = bare.to_megatron_provider(load_weights=False)
    provider.apply_overrides_and_finalize(dtype=torch.float32, overrides=SIZES)
    provider.register_post_wrap_hook(lambda chunks: hooked.append(type(chunks[0]).__name__))
    filled = bare.load_hf_weights(provider.provide_distributed_model(wrap_with_ddp=False), str(directory))
    return {
        "equal": equals(bare.export_hf_weights(filled), expected),
        "hooked": hooked,
        "handles": (bare.can_handle(directory), bare.can_handle(directory / "nothing")),
        "supports": (bare.supports(bare.hf_config), bare.supports(PretrainedConfig(architectures=["Nobody"]))),
    }


def embedded(rank: int, directory: Path, output: Path, expected: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    initialize_parallel(LAYOUT)
    return [
        as_verl_calls_mbridge(directory, output, expected),
        as_verl_calls_megatron_bridge(directory, output, expected),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory, _ = tiny_checkpoint(tmp_path_factory.mktemp("start"), "qwen3-moe", seed=3)
    expected = load_file(directory / "model.safetensors")
    output = tmp_path_factory.mktemp("output")
    ranks = run_ranks(embedded, LAYOUT.world_size, directory, output, expected, timeout=200)
    return expected, output, ranks


def test_mbridge(results: Any) -> None:
    expected, output, ranks = results
    for rank, (answers, _) in enumerate(ranks):
        assert answers["equal"] == [True, True]
        assert answers["narrowed"] == (len(expected) if rank == 3 else 0)
        assert answers["config"] == (0.25, 0.125, True)
        assert answers["frozen"]
        assert all(name.endswith("mlp.router.weight") for name in answers["frozen"])
        assert answers["distributed"]
        value, fsdp, parallel, unknown = answers["refused"]
        assert "NotOffered: mbridge.get_model does not offer use_torch_fsdp2=True" in fsdp
        assert "contradicts layout.cp" in parallel
        assert "'no_such_field' is no field" in unknown
        assert (rank < 2) == (value == "nothing")  # the head is on the last stage
    assert "value models are not offered" in ranks[3][0]["refused"][0]
    saved = output / "mbridge"
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert equals(load_file(saved / "model.safetensors").items(), expected)


def test_megatron_bridge(results: Any) -> None:
    expected, output, ranks = results
    for _, answers in ranks:
        assert answers["base_equal"]
        assert answers["some"] == answers["tasks"][3:5]
        assert answers["read"] == (4, False, False, True)
        assert answers["bare"] == "GPTModel"
        assert answers["built"]["equal"]
        assert answers["built"]["hooked"] == ["GPTModel"]
        assert answers["built"]["handles"] == answers["built"]["supports"] == (True, False)
        layers, field, mismatched, fsdp, tasks = answers["refused"]
        assert "NotOffered: num_layers=9: the checkpoint says 4" in layers
        assert "AttributeError: no_such_field is no field" in field
        assert "does not offer allowed_mismatched_params" in mismatched
        assert "does not offer use_megatron_fsdp=True" in fsdp
        assert "must be of this bridge's get_conversion_tasks" in tasks
    merged, adapters = ranks[0][1]["merged"], ranks[0][1]["adapters"]
    assert list(merged) == ranks[0][1]["tasks"]
    changed = {name for name in expected if not torch.equal(merged[name], expected[name])}
    assert changed == {name for name in expected if any(target in name for target in TARGETS)}
    for name in changed:
        module = name.removesuffix(".weight")
        delta = 2 * adapters[f"{module}.lora_B.weight"] @ adapters[f"{module}.lora_A.weight"]
        assert_near(merged[name], expected[name] + delta, rounding(4), what=name)  # products of rank 4
    assert equals(load_file(output / "merged" / "model.safetensors").items(), merged)
    peft = load_file(output / "adapter" / "adapter_model.safetensors")
    assert equals(peft.items(), {f"base_model.model.{name}": tensor for name, tensor in adapters.items()})
