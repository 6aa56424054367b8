"""Names of version 0.1: its modules import under them, with a warning, and what its checkpoints pickled can be read."""

from __future__ import annotations

import base64
import importlib
import pickle
import sys

import pytest

from mbridge_rl.moved import MOVED
from mbridge_rl.training.rollout.generator import EpisodeGroup
from mbridge_rl.training.rollout.guessing import GuessingGame

# `pickle.dumps` of a list of one unfinished group, by version 0.1.
GROUPS = (
    b"gASVZQIAAAAAAABdlIwdbWJyaWRnZV9ybC50cmFpbmluZy5nZW5lcmF0b3KUjAVHcm91cJSTlCmBlH2UKIwFaW5kZXiUSwOMB3Byb2JsZW2UjBttYnJp"
    b"ZGdlX3JsLnRyYWluaW5nLnJld2FyZHOUjAdQcm9ibGVtlJOUKYGUfZQojAZwcm9tcHSUjAE/lIwGYW5zd2VylIwBN5SMCG1ldGFkYXRhlH2UdWKMCWxh"
    b"c3Rfc3RlcJRLCYwIZXBpc29kZXOUXZQojBxtYnJpZGdlX3JsLnRyYWluaW5nLmVwaXNvZGVzlIwHRXBpc29kZZSTlCmBlH2UKGgHaAtoDV2USwFhjARz"
    b"ZWVklEsDjAtlbnZpcm9ubWVudJSMHG1icmlkZ2VfcmwudHJhaW5pbmcuZ3Vlc3NpbmeUjAxHdWVzc2luZ0dhbWWUk5QpgZR9lCiMB19oaWRkZW6UaBCM"
    b"Bl9mb3VuZJSJdWKMBnRva2Vuc5RdlChLBUsGZYwJbG9nX3Byb2JzlF2UKEe/4AAAAAAAAEcAAAAAAAAAAGWMCHZlcnNpb25zlF2UKEsCSv////9ljAZm"
    b"aW5pc2iUjACUjAV0dXJuc5RLAYwKdHVybl9zdGFydJRLAowHdmVyZGljdJROdWJoGCmBlH2UKGgHaAtoDV2USwFhaBxLBGgdTmglXZRLBWFoJ12UR7/g"
    b"AAAAAAAAYWgpXZRLAmFoK4wEc3RvcJRoLUsAaC5LAGgvaAiMB1ZlcmRpY3SUk5QpgZR9lCiMBnJld2FyZJRHP+AAAAAAAACMBWVycm9ylE51YnViZYwI"
    b"dmVyZGljdHOUXZR1YmEu"
)


@pytest.mark.parametrize("old_name", MOVED)
def test_an_old_name_gives_the_present_module(old_name: str) -> None:
    present = importlib.import_module(MOVED[old_name])
    sys.modules.pop(old_name, None)
    with pytest.warns(DeprecationWarning, match=f"{old_name} is {MOVED[old_name]} since mbridge_rl 0.2"):
        assert importlib.import_module(old_name) is present
    assert present.__spec__ is not None
    assert present.__spec__.name == MOVED[old_name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unfinished_groups_of_an_old_checkpoint_are_read() -> None:
    (group,) = pickle.loads(base64.b64decode(GROUPS))
    assert type(group) is EpisodeGroup
    unfinished, finished = group.episodes
    assert (group.index, group.last_step, group.problem.answer) == (3, 9, "7")
    assert (unfinished.tokens, unfinished.versions, unfinished.turn_start) == ([5, 6], [2, -1], 2)
    assert type(unfinished.environment) is GuessingGame
    assert unfinished.environment.respond("7") is None
    assert finished.verdict.reward == 0.5
