"""The room of Megatron's releases: what each difference is for, on whichever release is installed (`make matrix` runs several).

Changes that raise no error have tests with numbers here, in `tests/bridges/test_hybrid_models.py` (packed Mamba sequences) and
in `tests/bridges/test_families.py` (a norm of queries that the checkpoint does not have).
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES
from ranks import run_ranks
from torch import Tensor

from mbridge_rl.bridges import model_spec
from mbridge_rl.core.errors import LayoutError, UnsupportedModelError
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.megatron.context_parallel import context_parallel_positions
from mbridge_rl.megatron.cpu.runtime import megatron_runtime
from mbridge_rl.megatron.model import build_model
from mbridge_rl.megatron.parallel import destroy_parallel, initialize_parallel
from mbridge_rl.megatron.parameters import LiveParameters, layout_of
from mbridge_rl.megatron.versions import batches, config, names, release
from mbridge_rl.megatron.versions.layer_specs import submodules_of


def test_the_installed_release_is_a_tested_one() -> None:
    with megatron_runtime():
        import megatron.core

        assert release.MEGATRON_CORE.is_tested(megatron.core.__version__)


def test_a_release_that_is_too_old_is_refused_at_the_first_import() -> None:
    """In a process of its own, since a process imports Megatron once."""
    code = """
import megatron.core.package_info
megatron.core.package_info.__version__ = megatron.core.__version__ = "0.15.3"
from mbridge_rl.megatron.versions.release import check_release
check_release()
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "ImportError: megatron-core 0.15.3 is too old for mbridge_rl: its layer specs" in ran.stderr


RENAMED = {
    "mtp.layers.0.mtp_model_layer.self_attention.linear_proj.weight": "mtp.layers.0.transformer_layer.self_attention."
    "linear_proj.weight",
    "mtp.layers.12.mtp_model_layer": "mtp.layers.12.transformer_layer",
    "decoder.layers.3.mixer.conv1d_weight": "decoder.layers.3.mixer.conv1d.weight",
    "decoder.layers.3.mixer.conv1d_bias": "decoder.layers.3.mixer.conv1d.bias",
    "decoder.layers.0.self_attention.mamba.conv1d_weight": "decoder.layers.0.self_attention.mamba.conv1d.weight",
    "mtp.layers.0.mtp_model_layer.mixer.conv1d_bias": "mtp.layers.0.transformer_layer.mixer.conv1d.bias",
}
NOT_RENAMED = [
    "decoder.layers.3.self_attention.conv1d.weight",  # a gated delta net's, which is a module in every release
    "decoder.layers.3.mtp_model_layer.weight",
    "decoder.layers.3.mixer.conv1d_weights",
    "mtp.layers.0.mtp_model_layers.weight",
    "mtp.layers.0.enorm.weight",
    "embedding.word_embeddings.weight",
]


@pytest.mark.parametrize("native", [*RENAMED, *NOT_RENAMED])
def test_names_are_translated_both_ways(native: str) -> None:
    canonical = RENAMED.get(native, native)
    assert names.canonical_name(native) == canonical
    assert names.canonical_name(canonical) == canonical
    assert names.native_name(canonical, {native}) == native
    assert names.native_name(canonical, {canonical}) == canonical
    assert names.native_name(canonical, set()) == canonical


def _names_of_a_live_model(rank: int, variant: str) -> tuple[list[str], list[str], list[str]]:
    initialize_parallel(ParallelLayout())
    family = FAMILIES[variant]
    spec = model_spec(family.hf_config(), mtp=variant == "deepseek-v3")
    model = build_model(spec)
    native = [name for name, _ in model[0].named_parameters()]
    canonical = [names.canonical_name(name) for name in native]
    back = [names.native_name(name, native) for name in canonical]
    return native, back, sorted(set(LiveParameters(model, 0)) - {instance.megatron_name for instance in spec.instances})


@pytest.mark.parametrize("variant", ["deepseek-v3", "nemotron-h", "falcon-h1", "qwen3-next"])
def test_names_of_live_models_are_those_of_the_rules_and_lead_back(variant: str) -> None:
    """With the names of whichever release is installed."""
    [(native, back, unknown)] = run_ranks(_names_of_a_live_model, 1, variant)
    assert back == native
    assert unknown == []


def test_packed_sequences_have_what_mamba_layers_keep_them_apart_by() -> None:
    """Since 0.17 Megatron derives the sequences' numbers from `total_tokens`; 0.16's layers derive them themselves."""
    with megatron_runtime():
        params = batches.packed_sequences((0, 3, 4, 9), torch.device("cpu"))
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv_padded.tolist() == [0, 3, 4, 9]
    assert params.max_seqlen_q == 5
    if hasattr(params, "seq_idx"):
        assert params.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2]]


def _parts_of_a_row(rank: int, layout: ParallelLayout) -> tuple[Tensor, Tensor]:
    initialize_parallel(layout)
    at = layout.coordinates(rank)
    rows = torch.arange(32).view(2, 16)
    with megatron_runtime():
        part = batches.batch_of_context_rank({"tokens": rows.clone()})["tokens"]
    destroy_parallel()
    return part, rows[:, context_parallel_positions([0, 16], at.cp, layout.cp)]


@pytest.mark.parametrize("layout", [ParallelLayout(cp=2, dp=2), ParallelLayout(cp=2, tp=2), ParallelLayout(dp=2)], ids=str)
def test_a_batch_is_divided_over_its_context_parallel_ranks_alone(layout: ParallelLayout) -> None:
    """Not over the world, which Megatron's function takes since 0.18 where no group is given."""
    for part, expected in run_ranks(_parts_of_a_row, layout.world_size, layout):
        assert torch.equal(part, expected)


def test_submodules_of_both_kinds_of_specs() -> None:
    submodules = SimpleNamespace(linear_fc1=int)
    assert submodules_of(SimpleNamespace(submodules=submodules)) is submodules
    assert submodules_of(partial(dict, submodules=submodules)) is submodules
    assert submodules_of(partial(dict)) is None


NEUTRAL = SimpleNamespace(
    gtp_weight_remat_size=1,
    expert_gtp_weight_remat_size=1,
    moe_single_grouped_weight=False,
    moe_single_grouped_bias=False,
    moe_mlp_glu_interleave_size=None,
)


def test_neutral_values_and_missing_fields_are_accepted() -> None:
    config.refuse_unmapped(NEUTRAL, {})
    config.refuse_unmapped(SimpleNamespace(), {})
    config.refuse_unmapped(SimpleNamespace(moe_mlp_glu_interleave_size=32), {"moe_mlp_glu_interleave_size": 32})


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("gtp_weight_remat_size", 2, LayoutError, r"\(GTP, EGTP\), which cuts weights .* leave tensor_parallel_num_weight_sh"),
        ("expert_gtp_weight_remat_size", 4, LayoutError, "cuts experts' weights .* leave expert_tensor_parallel_num_weight_sh"),
        ("moe_single_grouped_weight", True, UnsupportedModelError, "all experts of a rank in one parameter"),
        ("moe_single_grouped_bias", True, UnsupportedModelError, "all experts of a rank in one parameter"),
        ("moe_mlp_glu_interleave_size", 32, UnsupportedModelError, r"=32 changes the order of the rows .* for None"),
    ],
)
def test_what_is_not_mapped_is_refused(field: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config.refuse_unmapped(SimpleNamespace(**{**vars(NEUTRAL), field: value}), {})


def test_a_parallel_state_with_weight_shards_is_refused() -> None:
    config.refuse_unmapped_groups(SimpleNamespace())
    config.refuse_unmapped_groups(SimpleNamespace(get_gtp_weight_remat_world_size=lambda: 1))
    with pytest.raises(LayoutError, match=r"over 2 more ranks \(EGTP\)"):
        config.refuse_unmapped_groups(SimpleNamespace(get_expert_gtp_weight_remat_world_size=lambda: 2))


def test_only_fields_of_the_release_are_set() -> None:
    assert config.cpu_fields({"apply_rope_fusion", "other"}) == {"apply_rope_fusion": False}
    assert config.quiet_fields({"cuda_graph_scope"}) == {"cuda_graph_scope": []}
    assert config.quiet_fields({"cuda_graph_scope", "cuda_graph_modules"}) == {"cuda_graph_modules": []}
    assert config.quiet_fields(set()) == {}


def _coordinates_and_stages(layout: ParallelLayout, layers: int) -> Any:
    return [layout.coordinates(rank) for rank in range(layout.world_size)], layout.layers_of_stages(layers)


def _layout_without_a_parallel_state(rank: int, layout: ParallelLayout, variant: str) -> Any:
    """The layout of a model with a parallel state, and its layout by the model's own groups alone, as if another library had
    built it. A group that is not set raises an error before 0.19, and is `None` since."""
    initialize_parallel(layout)
    spec = model_spec(FAMILIES[variant].hf_config())
    model = build_model(spec, layout)
    expected = layout_of(model, spec)
    for chunk in model:
        del chunk.parallel_layout
    destroy_model_parallel()
    own = layout_of(model, spec)
    for chunk in model:
        chunk.pg_collection = SimpleNamespace(**{axis: getattr(chunk.pg_collection, axis) for axis in ("tp", "cp", "pp")})
    if not spec.num_experts:
        assert layout_of(model, spec) == own
    return _coordinates_and_stages(expected, spec.num_layers), _coordinates_and_stages(own, spec.num_layers)


def destroy_model_parallel() -> None:
    with megatron_runtime():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("qwen3", ParallelLayout(tp=2, pp=2, stage_layers=(2, 1))),
        ("qwen3", ParallelLayout(tp=2, dp=2)),
        ("qwen3-moe", ParallelLayout(tp=2, ep=2, etp=1)),
    ],
    ids=str,
)
def test_a_models_own_groups_say_its_layout_where_there_is_no_parallel_state(variant: str, layout: ParallelLayout) -> None:
    for expected, own in run_ranks(_layout_without_a_parallel_state, layout.world_size, layout, variant):
        assert own == expected
