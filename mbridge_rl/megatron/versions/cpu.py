"""What Megatron needs on a machine without CUDA, by release."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def missing_names(moe_utils: ModuleType) -> list[tuple[Any, str, Any]]:
    """Names that a module of Megatron reads although their import failed, as `(module, name, value)`. 0.16 reads
    `te_general_gemm` before it tests whether Transformer Engine has it."""
    return [] if hasattr(moe_utils, "te_general_gemm") else [(moe_utils, "te_general_gemm", None)]
