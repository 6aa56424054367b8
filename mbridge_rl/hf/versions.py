"""Everything that differs between the releases of Transformers that this library works with.

Few differences are left to write down. Where tensors lie in a live module (experts in one tensor), and which names a checkpoint
has, is asked of Transformers itself (`hf.module`), so that the library follows when it changes; frequencies of rotary positions
come from Transformers' own functions. How older releases spell fields of configs is in `mbridge_rl.bridges.blocks.versions`,
beside the reader through which families read them.
"""

from __future__ import annotations

from mbridge_rl.core.releases import Releases

TRANSFORMERS = Releases(
    "transformers",
    oldest=(5, 9),
    newest_tested=(5, 24),
    reason="its configs lack fields that families of models need, and no test runs with it",
)


def check_release() -> None:
    """Checks the Transformers that this process imports.

    Raises:
        ImportError: it is too old, or is not installed.
    """
    import transformers

    TRANSFORMERS.check(transformers.__version__)
