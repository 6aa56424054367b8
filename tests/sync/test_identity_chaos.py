"""Identities that come round again: a sample of the runs of `identity_chaos.py`, and at night all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from identity_cases import FAULTS, KINDS
from identity_chaos import busy, kinds_of, runs
from identity_ground import Ground, Look, policy_of

LOAD = 12  # processes that spin, for two cores


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    made = Ground(Path(tmp_path_factory.mktemp("ground")))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_nothing_is_served_that_was_not_meant(seed: int, ground: Ground) -> None:
    ((_, case, outcome),) = runs(ground, [seed])
    assert not outcome.faults, (case, outcome)


@pytest.mark.nightly
@pytest.mark.alone
@pytest.mark.parametrize(("seeds", "load"), [(range(100, 400), 0), (range(1000, 1100), LOAD)], ids=["quiet", "loaded"])
def test_nothing_is_served_that_was_not_meant_in_all_runs(seeds: range, load: int, ground: Ground) -> None:
    with busy(load):
        faulty = [(seed, case, outcome) for seed, case, outcome in runs(ground, seeds) if kinds_of(outcome)]
    assert not faulty


def test_verdicts_tell_faults_from_sound_engines() -> None:
    version, other = 201, 202
    policy = policy_of(version)
    assert policy != policy_of(other)
    sound = Look((policy, policy), version, answered=policy, token_versions=frozenset({version}))
    verdicts = {
        sound.fault(): "",
        Look((policy, policy_of(other)), version, answered=-1).fault(): "mixture",
        Look((policy, policy), other, answered=policy).fault(): "other version",
    }
    assert all(verdict == expected for verdict, expected in verdicts.items())
    assert Look((policy, None), version).fault() == "mixture"
    assert Look((policy, policy), version, answered=policy_of(other)).fault() == "mixture"  # stale caches, for example
    assert Look((policy, policy), version, answered=policy, token_versions=frozenset({other})).fault() == "other version"
    assert not Look((policy, policy_of(other)), version, "refuses").fault()
    assert set(verdicts) - {""} <= set(FAULTS)
