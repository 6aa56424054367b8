"""Runs of `identity_chaos.py` with the real engine: it catches up, joins, commits or is dropped, and one of its processes, or
the trainer, stands still at some step meanwhile."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import leftovers
from identity_cases import TRAINER, Case, Outcome
from identity_ground import Call, Ground, Hang, Look, Trainer
from strikes import Reached, StepTracer, Strike, drawn, go_on, state_of, stepping

from mbridge_rl.core.errors import BridgeError

OPTIONS: dict[str, dict[str, Any]] = {
    "staged": {},
    "delta": {"delta": True},
    "streaming": {"mode": "streaming", "transport": "shared_memory"},
}


def play(ground: Ground, case: Case) -> Outcome:
    """One run; the first of its kind is preceded by one without a strike, which learns the steps."""
    if case.key not in ground.steps:
        ground.steps[case.key] = []  # a dry run is disturbed by nobody
        outcome = EngineScene(ground, case, None).run()
        assert not outcome.faults, f"undisturbed: {outcome}"
    strike = drawn(
        ground.steps[case.key], case.file, case.moment, case.repetition, case.action, 2 * ground.give_up * case.moment
    )
    return EngineScene(ground, case, strike).run()


class EngineScene:
    """
    Args:
        strike: `None` for a run that only counts steps.
    """

    def __init__(self, ground: Ground, case: Case, strike: Strike | None) -> None:
        self.ground, self.case, self.strike = ground, case, strike
        self.engine, self.replica = ground.engine, ground.replica()
        self.store = f"identity.{os.getpid()}.{secrets.token_hex(4)}"
        self.outcome = Outcome()
        self._before = ground.serves

    def run(self) -> Outcome:
        kinds: dict[str, Callable[[], None]] = {
            "catch up": self._catches_up, "join": self._joins, "commit": self._commits, "drop": self._commits,
        }  # fmt: skip
        if self.case.victim == TRAINER:
            kinds["catch up"] = self._catches_up_beside_a_held_trainer
        try:
            kinds[self.case.kind]()
        finally:
            for pid in self.ground.pids.values():
                go_on(pid)
            leftovers.remove(self.store)
        return self.outcome

    def _catches_up(self) -> None:
        """Commits versions while the engine reads one of them."""
        with self._trainer(with_engine=False) as trainer:
            self._commit_undisturbed(trainer, self._version(1))
            with self._armed():
                call = Call(lambda: self.engine.catch_up(self.store))
                self._until_struck(call)
                trainer.commits(self._versions(2, self.case.commits), [])
                self._go_on()
                report = self._result_or_none(call, "catch_up")
            look = self._judge(report.version if report else None)
            if report is None and not look.refusal and look.version != self._before:
                self._fault("other version", f"catch_up failed, and {look} is served")
            self._require_recovery(lambda: self.engine.catch_up(self.store), self._version(1 + self.case.commits))

    def _catches_up_beside_a_held_trainer(self) -> None:
        with self._trainer(with_engine=False) as trainer:
            self._commit_undisturbed(trainer, self._version(1))
            tracer = StepTracer(self.strike)

            def commit() -> None:
                with stepping(tracer):
                    trainer.commits(self._versions(2, self.case.commits), [])

            call = Call(commit)
            while self.strike is not None and not tracer.arrived.wait(0.01) and call.is_alive():
                pass
            report = self._result_or_none(Call(lambda: self.engine.catch_up(self.store)), "catch_up")
            self._judge(report.version if report else None)
            tracer.released.set()
            call.result(self.ground.hang, "the trainer")
            self._learn(tracer.place, tracer.reached)
            self._require_recovery(lambda: self.engine.catch_up(self.store), self._version(1 + self.case.commits))

    def _joins(self) -> None:
        with self._trainer(with_engine=False) as trainer:
            self._commit_undisturbed(trainer, self._version(1))
            with self._armed():
                self.engine.set_call_timeout(self.ground.give_up)
                call = Call(lambda: trainer.sync.add_engine(self.engine))
                self._until_struck(call)
                others = None
                if not self.case.early:
                    others = Call(lambda: trainer.commits(self._versions(2, self.case.commits), []))
                    others.join(self.ground.hang)
                self._go_on()
                joined = self._result_or_none(call, "add_engine")
                if others is not None:
                    others.result(self.ground.hang, "the trainer that goes on without the newcomer")
            self._judge(joined if self.case.early else None)
            self._require_place_in(trainer)

    def _commits(self) -> None:
        with self._trainer(with_engine=True) as trainer:
            self._commit_undisturbed(trainer, self._version(1))
            errors: list[BaseException] = []
            with self._armed():
                self.engine.set_call_timeout(self.ground.give_up)
                call = Call(lambda: trainer.commits(self._versions(2, self.case.commits), errors))
                self._until_struck(call)
                if not self.case.early:
                    call.join(self.ground.hang)
                self._go_on()
                self._result_or_none(call, "the trainer")
            self.outcome.messages += [_brief(error) for error in errors]
            self._judge(None)
            self._require_place_in(trainer)

    def _commit_undisturbed(self, trainer: Trainer, version: int) -> None:
        """The time-outs are those of versions that are struck: a busy machine may take longer."""
        deadline = time.monotonic() + self.ground.hang
        while True:
            try:
                trainer.commit(version)
                return
            except BridgeError:
                if time.monotonic() > deadline:
                    raise

    def _require_place_in(self, trainer: Trainer) -> None:
        """Whatever became of the engine, it comes back, and the next version is everybody's."""

        def comes_back() -> None:
            if self.engine not in trainer.sync.engines:
                trainer.sync.add_engine(self.engine)
            trainer.commit(self._version(7))

        self._require_recovery(comes_back, self._version(7))
        look = self.ground.look_at(self.replica.version, self.replica.shas(), self.replica.refusal())
        if look.fault() or look.version != self._version(7):
            self._fault(look.fault() or "other version", f"the other replica: {look}")

    def _require_recovery(self, action: Callable[[], object], version: int) -> None:
        """Repeats `action` until it succeeds: late effects of the strike, or a busy machine, may make an attempt fail."""
        self.engine.set_call_timeout(self.ground.hang)
        deadline = time.monotonic() + self.ground.hang
        while True:
            try:
                Call(action).result(self.ground.hang, "the engine's return")
                break
            except BridgeError as error:
                self.outcome.messages.append(f"again: {_brief(error)}")
                if time.monotonic() > deadline:
                    self._fault("other", f"the engine cannot come back: {_brief(error)}")
                    return
        look = self._judge(version)
        if look.refusal:
            self._fault("other", f"the engine came back and refuses: {look.refusal}")

    def _judge(self, reported: int | None) -> Look:
        """What the engine holds and serves now.

        Args:
            reported: the version that somebody was told.
        """
        look = self.ground.look()
        if fault := look.fault():
            self._fault(fault, str(look))
        elif reported is not None and not look.refusal and look.version != reported:
            self._fault("other version", f"{reported} was reported: {look}")
        if not look.fault() and not look.refusal:
            self.ground.serves = look.version
        return look

    def _fault(self, kind: str, text: str) -> None:
        self.outcome.faults.append(f"{kind}: {text}")

    @contextmanager
    def _trainer(self, *, with_engine: bool) -> Iterator[Trainer]:
        ground = self.ground
        options = OPTIONS[self.case.way] | {"lost_engines": "drop" if self.case.kind == "drop" else "raise"}
        engines = [self.engine, self.replica] if with_engine else [self.replica]
        wait = {"timeout": 3 * ground.give_up, "retries": 0} if self.strike else {}
        trainer = Trainer(ground.states, engines, store=self.store, **options, **wait)
        try:
            yield trainer
        finally:
            trainer.close()

    @contextmanager
    def _armed(self) -> Iterator[None]:
        """Counts the steps of the engine inside of the block; afterwards it is known where the strike came."""
        self.engine.ask("arm", self.case.victim, self.strike)
        try:
            yield
        finally:
            self._go_on()
            self.engine.set_call_timeout(self.ground.hang)
        self._learn(*self.engine.ask("disarm"))

    def _learn(self, place: str, reached: Reached) -> None:
        self.outcome.place = place
        if self.strike is None:
            self.ground.steps[self.case.key] = reached

    def _until_struck(self, call: Call) -> None:
        """The victim stands still, or it has not come to that step, and all is over."""
        if self.strike is None or self.strike.action == "delay":
            return
        deadline = time.monotonic() + self.ground.hang
        while call.is_alive() and state_of(self._victim) != "T":
            if time.monotonic() > deadline:
                raise Hang("the victim has not come to its step, and its call does not end")
            time.sleep(0.005)
        time.sleep(0.1 if self.case.early else 0.02)  # for the other worker, to be done with its part

    def _go_on(self) -> None:
        go_on(self._victim)

    def _result_or_none(self, call: Call, what: str) -> Any:
        """The call's result, or `None` if it failed, whose error is noted in the messages of the outcome."""
        try:
            return call.result(self.ground.hang, what)
        except BridgeError as error:
            self.outcome.messages.append(_brief(error))
            return None

    @property
    def _victim(self) -> int:
        return self.ground.pids[self.case.victim]

    def _version(self, index: int) -> int:
        return 100 * self.case.number + index

    def _versions(self, first: int, count: int) -> Sequence[int]:
        return range(self._version(first), self._version(first + count))


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:110]}"
