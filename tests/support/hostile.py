"""Inputs that strangers could write: valid ones with a few things wrong, and what one may expect of a reader of them."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mbridge_rl.core.errors import BridgeError

INPUTS = int(os.environ.get("MBRIDGE_FUZZ_INPUTS", "10000"))
"""How many inputs of each kind `make nightly` tries."""

ORDINARY = settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
NIGHTLY = settings(ORDINARY, max_examples=INPUTS, derandomize=False, print_blob=True)

MOST_SECONDS = 2.0

# Texts that break what forgets to escape them: markup, control codes, ends of strings, paths.
TEXTS = (
    *("", " ", "x", "nan", "1e999", "true", "[/INST]", "[red]", "{0.__class__}", "%s", "\x1b[2J", "\0", "\ud800", "é😀"),
    *("../x", "/etc/passwd", "a/../../b", ".", "..", "a\nb", "x" * 5000, "(a+)+$", "(?:.|..)*!", "(", "*", "a{99999}"),
    *("F32", "U64", "F4"),
)
NUMBERS = (
    *(0, 1, 2, -1, -64, 3, 7, 64, 255, 2**16 + 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1.0, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
)


def _nested(depth: int, inner: Any = None) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


CONTAINERS = ([], {}, [None], [[]], [0, 0], [-1, 1], ["x"], {"": None}, {"x": {"y": []}}, [1] * 300, _nested(20), _nested(60))
VALUES = (None, True, False, *NUMBERS, *TEXTS, *CONTAINERS)


def entries_of(value: Any) -> list[tuple[Any, Any]]:
    """Every pair of a container and a key (or index) in a JSON value, at any depth."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [entry for key in keys for entry in ((value, key), *entries_of(value[key]))]


@st.composite
def damaged(draw: st.DrawFn, valid: Any, fields: tuple[str, ...] = ()) -> Any:
    """Draws a valid JSON value with up to three entries replaced, removed, renamed, added, or exchanged for other entries.

    Args:
        fields: names that may be added, beside those that are there.
    """
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 3))):
        entries = entries_of(value)
        if not entries:
            return value
        container, key = draw(st.sampled_from(entries))
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "add", "exchange")))
        hostile = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if action == "replace":
            container[key] = hostile
        elif action == "remove":
            del container[key]
        elif action == "exchange":
            other, at = draw(st.sampled_from(entries))
            container[key] = copy.deepcopy(other[at])
        elif isinstance(container, list):
            container.append(hostile)
        elif action == "rename":
            container[draw(st.sampled_from(TEXTS))] = container.pop(key)
        else:
            container[draw(st.sampled_from((*fields, *TEXTS)))] = hostile
    return value


BYTES = (b"\xff", b"\0", b'"', b"}", b"]", b"[" * 3000, b'{"a":' * 200, b"\xef\xbb\xbf", b",", b"9" * 5000, b"NaN")


def seldom(usual: Any, others: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of the others in one of eight inputs."""
    return st.integers(0, 7).flatmap(lambda chance: st.sampled_from(others) if chance == 7 else st.just(usual))


@st.composite
def damaged_text(draw: st.DrawFn, values: st.SearchStrategy[Any], dump: Callable[[Any], str] = json.dumps) -> bytes:
    """Values as text, of which some bytes may be wrong, missing or doubled."""
    text = dump(draw(values)).encode("utf-8", "surrogatepass")
    for _ in range(draw(seldom(0, (1, 2)))):
        at, count = draw(st.integers(0, len(text))), draw(st.integers(0, 40))
        action = draw(st.sampled_from(("cut", "end", "put", "double")))
        put = draw(st.sampled_from(BYTES))
        if action == "cut":
            text = text[:at] + text[at + count :]
        elif action == "end":
            text = text[:at]
        elif action == "put":
            text = text[:at] + put + text[at:]
        else:
            text = text[: at + count] + text[at:]
    return text


@contextmanager
def only_our_errors(folder: Path | None = None) -> Iterator[None]:
    """What is read inside succeeds, or ends in an error of this library with a text; it takes at most `MOST_SECONDS` of this
    thread's processor time (a busy machine adds none), and leaves `folder` as it was."""
    before = _contents(folder)
    started = time.thread_time()
    try:
        yield
    except BridgeError as error:
        text = str(error)
        assert text
        assert len(text) < 20_000
    seconds = time.thread_time() - started
    assert seconds < MOST_SECONDS, f"it took {seconds:.1f} s"
    assert _contents(folder) == before


def _contents(folder: Path | None) -> dict[str, int]:
    if folder is None:
        return {}
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}
