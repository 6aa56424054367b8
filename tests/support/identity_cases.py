"""What a run of `identity_chaos.py` is, and what came of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from strikes import Action
from struck_engine import ENGINE

KINDS = ("catch up", "join", "commit", "drop", "two trainers", "two savers")
WAYS = ("staged", "staged", "delta", "streaming")
TRAINER = "trainer"
FAULTS = ("mixture", "other version", "lost", "hang", "other")


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        number: of the run, from 2; its versions are `100 * number + 1` and so on.
        way: how versions travel.
        victim: who is struck: an engine's worker, by its rank, the process that drives them, or the trainer.
        action: what happens to it.
        file, moment, repetition: 0..1, at which of its steps (`strikes.drawn`).
        commits: versions that the trainer goes on to meanwhile.
        early: it goes on before anybody has given it up.
        second_file, second_moment, second_action: of the second saver, or trainer.
    """

    number: int
    kind: str
    way: str
    victim: str | int
    action: Action
    file: float
    moment: float
    repetition: float
    commits: int
    early: bool
    second_file: float
    second_moment: float
    second_action: Action | None

    @property
    def key(self) -> tuple[str, str, str]:
        """Runs of one key take the same steps, if nobody is struck."""
        kind = "commit" if self.kind == "drop" else self.kind
        return kind, self.way, "worker" if isinstance(self.victim, int) else self.victim


@dataclass
class Outcome:
    """
    Attributes:
        place: where the strike came; empty if the run ended before.
        faults: `kind of fault: what was seen`.
        messages: errors and notes of the processes that were disturbed.
    """

    place: str = ""
    faults: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


def drawn_case(seed: int, number: int) -> Case:
    """The run of a seed. Kinds take turns, everything else is drawn."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    apart = kind in ("two trainers", "two savers")  # processes that may be killed: they are nobody else's
    victims: list[str | int] = [0, 1, 0, 1, ENGINE] + ([TRAINER] if kind == "catch up" else [])
    victim = TRAINER if apart else draw.choice(victims)
    actions: list[Action] = ["stop", "stop", "kill"] if apart else ["stop", "stop", "stop", "delay"]
    action: Action = "wait" if victim == TRAINER and not apart else draw.choice(actions)
    return Case(
        number,
        kind,
        draw.choice(WAYS) if kind in ("commit", "drop") else "staged",
        victim,
        action,
        draw.random(),
        draw.random(),
        draw.choice([0.0, 0.0, draw.random()]),
        draw.choice(
            [2, 3, 3, 4] if kind == "drop" else [1, 2, 2, 3, 4]
        ),  # slots take turns: every second commit fills the same
        draw.random() < {"drop": 0.1, "two trainers": 0.5, "two savers": 0.5}.get(kind, 0.3),
        draw.random(),
        draw.random(),
        draw.choice([None, "stop", "stop", "kill"]),
    )
