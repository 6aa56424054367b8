"""Reads YAML from untrusted files, with bounds on its bytes and on its nodes after aliases are followed, and no name twice.

Aliases (`*base`) are allowed, but they may not multiply a file beyond the bound, or lead back to themselves.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

MOST_BYTES = 1 << 17
_MOST_NODES = 20_000
_MOST_DEPTH = 32


class YAMLTextError(ValueError):
    """The text is no YAML, or exceeds the bounds."""


def parse_yaml(text: bytes | str) -> Any:
    """Parses the text as `yaml.safe_load` does.

    Raises:
        YAMLTextError: the text is no YAML, too long, too deeply nested, or too large after aliases are followed, or a section
            has a field twice.
    """
    if len(text) > MOST_BYTES:
        raise YAMLTextError(f"too long: at most {MOST_BYTES:,} bytes are read")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except YAMLTextError:
        raise
    except RecursionError:
        raise YAMLTextError(f"nested more than {_MOST_DEPTH} levels deep") from None
    # The library converts scalars with int(), float(), date() and tables of words, whose errors it does not translate.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise YAMLTextError(f"no YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """Stops at what is nested too deeply while it reads: PyYAML takes time that grows with the square of the depth."""

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        if self.flow_level > _MOST_DEPTH:
            raise YAMLTextError(f"nested more than {_MOST_DEPTH} levels deep")
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        if len(self.indents) > _MOST_DEPTH:
            raise YAMLTextError(f"nested more than {_MOST_DEPTH} levels deep")
        return super().add_indent(column)


def _check(root: yaml.Node) -> None:
    _Size().of(root, 0)


class _Size:
    """Counts every node as often as aliases repeat it, but visits each distinct node only once."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._open: set[int] = set()

    def of(self, node: yaml.Node, depth: int) -> int:
        if id(node) in self._open:
            raise YAMLTextError(f"no YAML: an alias leads to itself{node.start_mark}")
        if depth > _MOST_DEPTH:
            raise YAMLTextError(f"nested more than {_MOST_DEPTH} levels deep")
        if id(node) not in self._known:
            self._open.add(id(node))
            size = 1 + sum(self.of(child, depth + 1) for child in _children(node))
            self._open.remove(id(node))
            if size > _MOST_NODES:
                raise YAMLTextError(f"too large: more than {_MOST_NODES:,} values after aliases are followed")
            self._known[id(node)] = size
        return self._known[id(node)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        names = Counter((name.tag, name.value) for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        if twice := [name for (tag, name), count in names.items() if count > 1 and not tag.endswith(":merge")]:
            raise YAMLTextError(f"no YAML: {twice[0][:100]!r} stands twice in one section{node.start_mark}")
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
