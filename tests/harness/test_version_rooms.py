"""Only the version rooms ask which release of Megatron-core, Transformers or vLLM is installed, or what it has.

Everything else is written for one interface; a difference between releases belongs into `mbridge_rl/megatron/versions/`,
`mbridge_rl/hf/versions.py` or `mbridge_rl/sync/vllm/versions.py`, where it is written down with the release that brought it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mbridge_rl

PACKAGE = Path(mbridge_rl.__file__).parent
ROOMS = (PACKAGE / "megatron" / "versions", PACKAGE / "hf" / "versions.py", PACKAGE / "sync" / "vllm" / "versions.py")
FOREIGN = ("megatron", "transformers", "vllm")
DESCRIPTIONS = ("signature", "getfullargspec", "fields")


def _sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not any(path == room or room in path.parents for room in ROOMS)]


def _is_foreign(module: str | None) -> bool:
    return (module or "").split(".")[0] in FOREIGN


def _foreign_names(tree: ast.AST) -> set[str]:
    """Names that the file's imports of Megatron, Transformers and vLLM bind, wherever they stand."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_foreign(node.module):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names if _is_foreign(alias.name)}
    return bound


def _root(node: ast.expr) -> str | None:
    """The name at the beginning of `name.attribute.attribute`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _imports(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements with imports of Megatron, Transformers and vLLM, by statement or by `import_module`."""
    for statement in body:
        if any(map(_is_import, ast.walk(statement))):
            yield statement


def _is_import(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return _is_foreign(node.module)
    if isinstance(node, ast.Import):
        return any(_is_foreign(alias.name) for alias in node.names)
    called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
    return called in ("import_module", "find_spec", "__import__") and _is_foreign(_constant(node, 0))


def _constant(call: ast.AST, position: int) -> str:
    """The text that a call gives as an argument, if it gives one."""
    arguments = call.args if isinstance(call, ast.Call) else []
    argument = arguments[position] if len(arguments) > position else None
    return str(argument.value) if isinstance(argument, ast.Constant) else ""


def _catches_missing_modules(handler: ast.ExceptHandler) -> bool:
    caught = "" if handler.type is None else ast.unparse(handler.type)
    return handler.type is None or any(name in caught for name in ("ImportError", "ModuleNotFoundError", "AttributeError"))


def _is_version_of_foreign(node: ast.AST, names: set[str]) -> bool:
    if not isinstance(node, ast.Attribute) or node.attr != "__version__":
        return False
    return _root(node) in names or any(map(_is_import, ast.walk(node.value)))


def _asks(call: ast.Call, names: set[str]) -> bool:
    return _asks_for_a_version(call) or _probes(call, names)


def _asks_for_a_version(call: ast.Call) -> bool:
    called = ast.unparse(call.func)
    return (called == "version" or called.endswith("metadata.version")) and _is_foreign(_constant(call, 0).replace("-", "."))


def _probes(call: ast.Call, names: set[str]) -> bool:
    """Whether a call asks something of Megatron's or Transformers' what it has. A lookup by a name from elsewhere, such as the
    class of an architecture, is none."""
    called = ast.unparse(call.func).split(".")[-1]
    name = _constant(call, 1)
    by_name = called in ("hasattr", "getattr") and (called == "hasattr" or len(call.args) == 3) and name != ""
    if name.startswith("_mbridge"):  # a mark that this library has set itself
        return False
    return (by_name or called in DESCRIPTIONS) and bool(call.args) and _root(call.args[0]) in names


def violations(source: str) -> list[str]:
    """Statements of a file that are allowed in the version rooms only, each as "line: statement"."""
    tree = ast.parse(source)
    names, statements = _foreign_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(map(_catches_missing_modules, node.handlers)):
            statements += [f"{statement.lineno}: tries an import" for statement in _imports(node.body)]
        elif _is_version_of_foreign(node, names) or (isinstance(node, ast.Call) and _asks(node, names)):
            statements.append(f"{node.lineno}: {ast.unparse(node)}")
    return statements


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_outside_of_the_rooms_asks_for_a_release(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import importlib.metadata\nimportlib.metadata.version('megatron-core')",
        "from importlib.metadata import version\nversion('transformers')",
        "def f():\n    import megatron.core\n    return megatron.core.__version__",
        "import transformers\nif transformers.__version__ > '5.10': pass",
        "import importlib\nimportlib.import_module('megatron.core').__version__",
        "try:\n    from megatron.core.models.hybrid import HybridModel\nexcept ImportError:\n    HybridModel = None",
        "try:\n    import transformers\nexcept Exception as e:\n    pass\nexcept ModuleNotFoundError:\n    pass",
        "try:\n    x = importlib.import_module('megatron.core.x')\nexcept ImportError:\n    pass",
        "from megatron.core import dist_checkpointing\nimport inspect\ninspect.signature(dist_checkpointing.save)",
        "from megatron.core.packed_seq_params import PackedSeqParams as P\nhasattr(P, 'total_tokens')",
        "from transformers import LlamaConfig\ngetattr(LlamaConfig, 'rope_parameters', None)",
        "try:\n    from vllm import LLM\nexcept ImportError:\n    LLM = None",
        "from megatron.core.x import Config\nimport dataclasses\ndataclasses.fields(Config)",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import reasoning_gym\nexcept ImportError:\n    pass",
        "from megatron.core import parallel_state\nparallel_state.get_rank()",
        "def f(module):\n    return hasattr(module, 'weight')",
        "import torch\ntorch.__version__",
        "from transformers import CONFIG_MAPPING\ngetattr(CONFIG_MAPPING, name)",
    ],
)
def test_the_check_leaves_alone(source: str) -> None:
    assert violations(source) == []
