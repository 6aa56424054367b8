"""Requests in flight when a version is committed: kept, waited for, or aborted, by a real vLLM engine."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

import request_scenarios as scenarios
from interpreter import Interpreter


@pytest.mark.slow
def test_requests_in_flight_at_a_commit(tmp_path: Path) -> None:
    interpreter = Interpreter()
    try:
        found = interpreter.call(scenarios.commits_amid_requests, tmp_path)
    finally:
        interpreter.close()
    for mode in ("staged", "streaming"):
        before, after, kept, _ = found["keep", mode]
        assert kept.finish_reason == "length"
        assert set(kept.token_versions) == {before, after}
        assert list(kept.token_versions) == sorted(kept.token_versions)  # old ones, then new ones
        assert found["keep", mode, "as if prompted"]  # no key or value of the old weights was used again
        before, _, waited, _ = found["wait", mode]
        assert len(waited.tokens) == scenarios.LENGTH
        assert set(waited.token_versions) == {before}
        before, _, aborted, pause = found["abort", mode]
        assert aborted.finish_reason == "abort"
        assert 0 < len(aborted.tokens) < scenarios.LENGTH
        assert set(aborted.token_versions) == {before}
        assert pause > 0
    assert "requests did not finish within 0.3 s" in found["late"]
    assert found["serves on"]
