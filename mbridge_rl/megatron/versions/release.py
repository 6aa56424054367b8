"""Which releases of Megatron-core are known to work."""

from __future__ import annotations

from mbridge_rl.core.releases import Releases

MEGATRON_CORE = Releases(
    "megatron-core",
    oldest=(0, 16, 1),
    newest_tested=(0, 19),
    reason="its layer specs, pipeline layouts and optimizers have other interfaces than those that mbridge_rl uses",
)


def check_release() -> None:
    """Checks the Megatron-core that this process imports; on a machine without CUDA inside of `megatron_runtime` only.

    Raises:
        ImportError: it is too old, or is not installed.
    """
    import megatron.core

    MEGATRON_CORE.check(megatron.core.__version__)
