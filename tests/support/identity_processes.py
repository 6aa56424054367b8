"""Runs of `identity_chaos.py` with two processes that want the same: trainers one store name, or savers one directory."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import leftovers
from identity_actors import Actor, Answer, ending
from identity_cases import Case, Outcome
from identity_ground import SIZES, VARIANT, Call, Ground, Look, Trainer, policy_of
from standin import light_model
from strikes import Reached, Strike, drawn, go_on

from mbridge_rl.bridge import AutoBridge
from mbridge_rl.core.errors import BridgeError
from mbridge_rl.core.layout import ParallelLayout

_PAUSE = 2.0  # that somebody who stands still may hold up the other one
_INITIAL = 0


def play_trainers(ground: Ground, case: Case) -> Outcome:
    """Two trainers with one store name: one stops or dies, and its successor starts."""
    strikes = _strikes(ground, case, lambda outcome: _Trainers(ground, case, outcome).dry())
    outcome = Outcome(_intended(ground, case, strikes))
    _Trainers(ground, case, outcome).run(*strikes)
    return outcome


def play_savers(ground: Ground, case: Case) -> Outcome:
    """Two savers into one directory, which holds a good checkpoint already."""
    strikes = _strikes(ground, case, lambda outcome: _Savers(ground, case, outcome).dry())
    outcome = Outcome(_intended(ground, case, strikes))
    _Savers(ground, case, outcome).run(*strikes)
    return outcome


def _strikes(ground: Ground, case: Case, dry: Callable[[Outcome], Reached]) -> tuple[Strike, Strike | None]:
    if case.key not in ground.steps:
        outcome = Outcome()
        ground.steps[case.key] = dry(outcome)
        assert not outcome.faults, f"undisturbed: {outcome}"
    steps = ground.steps[case.key]
    second = None
    if case.second_action is not None:
        second = drawn(steps, case.second_file, case.second_moment, case.repetition, case.second_action)
    return drawn(steps, case.file, case.moment, case.repetition, case.action), second


def _intended(ground: Ground, case: Case, strikes: tuple[Strike, Strike | None]) -> str:
    """Where one who is killed cannot say that he was; the steps are always come to."""
    return ground.steps[case.key][strikes[0].step][0]


class _Trainers:
    def __init__(self, ground: Ground, case: Case, outcome: Outcome) -> None:
        self._ground, self._case, self._outcome = ground, case, outcome
        self._store = f"identity.{os.getpid()}.{secrets.token_hex(4)}"

    def dry(self) -> Reached:
        with ending() as actors:
            trainer = self._trainer(actors)
            first, second = self._commit(trainer, 1), self._commit(trainer, 2)
            assert first is not None
            assert second is not None
            assert not first.error + second.error, (first, second)
            trainer.leave(self._ground.hang)
        leftovers.remove(self._store)
        return second.reached

    def run(self, strike: Strike, _: Strike | None) -> None:
        ground, case = self._ground, self._case
        try:
            with ending() as actors:
                first = self._trainer(actors)
                self._commit(first, 1)
                first.begin(self._version(2), strike)
                answer = first.wait(ground.hang)
                stands = answer is None and not first.is_dead
                if answer is not None:
                    self._examine("first trainer", answer)
                second = self._trainer(actors)
                if not case.early:
                    self._engine_catches_up()
                second.begin(self._version(3))
                later = second.wait(_PAUSE if stands else ground.hang)
                if later is not None:
                    self._examine("second trainer", later)
                if stands and case.second_action == "kill":
                    first.kill()
                elif stands:
                    go_on(first.pid)
                    answer = first.require(ground.hang, "the first trainer")
                    self._examine("first trainer", answer)
                if later is None:
                    later = second.require(ground.hang, "the second trainer")
                    self._examine("second trainer", later)
                if first.is_dead or first.ended:
                    self._require(self._commit(second, 4), "a trainer whose predecessor has died")
                else:
                    self._commit_while_both_live(first, second)
                self._engine_catches_up()
                for actor in actors:
                    if not actor.ended and not actor.is_dead:
                        actor.leave(ground.hang)
            self._engine_catches_up(must=True)
            with ending() as actors:
                last = self._trainer(actors)
                self._require(self._commit(last, 7), "a trainer that is alone")
                last.leave(ground.hang)
        finally:
            leftovers.remove(self._store)

    def _commit_while_both_live(self, first: Actor, second: Actor) -> None:
        """Lets both trainers commit while both live. Each may be refused, but what its engine serves has to be its own."""
        first.begin(self._version(4))
        second.begin(self._version(5))
        self._examine("first trainer", first.require(self._ground.hang, "the first trainer"))
        self._examine("second trainer", second.require(self._ground.hang, "the second trainer"))

    def _commit(self, actor: Actor, index: int) -> Answer | None:
        actor.begin(self._version(index))
        answer = actor.require(self._ground.hang, "a trainer")
        self._examine("a trainer", answer)
        return answer

    def _require(self, answer: Answer | None, who: str) -> None:
        if answer is None or answer.error:
            self._outcome.faults.append(f"other: {who} cannot commit: {answer.error[:200] if answer else 'it died'}")

    def _examine(self, who: str, answer: Answer | None) -> None:
        """Notes the trainer's errors, and judges what its own engine holds."""
        if answer is None:
            return
        if answer.error:
            self._outcome.messages.append(f"{who}: {answer.error[:110]}")
        if answer.crash:
            self._outcome.faults.append(f"other: {who}: {answer.crash.strip().splitlines()[-1]}")
        self._judge(f"the engine of the {who}", self._ground.look_at(*answer.state), initial=_INITIAL)

    def _engine_catches_up(self, *, must: bool = False) -> None:
        """Lets the real engine catch up from whatever is in the store, and judges what it serves."""
        ground = self._ground
        call, report = Call(lambda: ground.engine.catch_up(self._store)), None
        try:
            report = call.result(ground.hang, "catch_up")
        except BridgeError as error:
            self._outcome.messages.append(f"catch_up: {str(error)[:110]}")
            if must:
                self._outcome.faults.append(f"lost: the store has no version any more: {str(error)[:200]}")
        look = ground.look()
        self._judge("the engine", look)
        if report is not None and not look.refusal and report.version != look.version:
            self._outcome.faults.append(f"other version: {report['version']} was reported: {look}")
        if not look.fault() and not look.refusal:
            ground.serves = look.version

    def _judge(self, who: str, look: Look, initial: int | None = None) -> None:
        if fault := look.fault(initial):
            self._outcome.faults.append(f"{fault}: {who}: {look}")

    def _trainer(self, among: list[Actor]) -> Actor:
        ground, store, give_up = self._ground, self._store, self._ground.give_up

        def make() -> Any:
            replica, trainer = ground.replica(), None

            def act(version: int) -> None:
                nonlocal trainer
                if trainer is None:
                    trainer = Trainer(ground.states, [replica], store=store, timeout=5 * give_up)
                trainer.commit(version)

            def find() -> tuple[int, list[str], str]:
                return replica.version, replica.shas(), replica.refusal()

            return act, find, lambda: trainer and trainer.close()

        return Actor(make, among)

    def _version(self, index: int) -> int:
        return 100 * self._case.number + index


class _Savers:
    def __init__(self, ground: Ground, case: Case, outcome: Outcome) -> None:
        self._ground, self._case, self._outcome = ground, case, outcome
        self._folder = ground.folder / f"saved-{case.number}"
        self._target = self._folder / "checkpoint"
        self._known = {_sha_of_state(state): policy for policy, state in enumerate(ground.states)}

    def dry(self) -> Reached:
        try:
            with ending() as actors:
                saver = self._saver(actors)
                self._save(saver, 1)
                answer = self._save(saver, 2)
                assert answer is not None
                assert not answer.error, answer
                assert self._saved_policy() == self._policy(2)
                return answer.reached
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, strike: Strike, second_strike: Strike | None) -> None:
        ground, messages = self._ground, self._outcome.messages
        try:
            with ending() as actors:
                first, second = self._saver(actors), self._saver(actors)
                self._save(first, 1)
                self._require_complete("an undisturbed save", {1})
                first.begin(self._policy(2), strike)
                answers = {2: first.wait(ground.hang)}
                self._require_complete("the first saver stands still or is done", {1, 2})
                second.begin(self._policy(3), second_strike)
                answers[3] = second.wait(_PAUSE if self._stands(first, answers[2]) else ground.hang)
                self._require_complete("the second one stands still or is done", {1, 2, 3})
                order = [(2, first, "first"), (3, second, "second")]
                for index, actor, name in order if self._case.early else reversed(order):
                    if self._stands(actor, answers[index]):
                        # It may have to wait for a lock that the other saver holds as long as that one is stopped.
                        go_on(actor.pid)
                        answers[index] = actor.wait(_PAUSE)
                        self._require_complete(f"the {name} saver went on", {1, 2, 3})
                for index, actor, name in order:
                    if answers[index] is None:
                        answers[index] = actor.require(ground.hang, f"the {name} saver")
                    self._require_complete(f"the {name} saver is done", {1, 2, 3})
                    self._note(name, answers[index])
                done = {index for index, answer in answers.items() if answer is not None and not answer.error + answer.crash}
                died = {index for index, answer in answers.items() if answer is None}
                # A saver that reports success has replaced the checkpoint that was there before.
                self._require_complete("both are done", done | died | (set() if done else {1}))
            with ending() as actors:
                answer = self._save(self._saver(actors), 4)
                self._note("last", answer)
                if answer is None or answer.error:
                    self._outcome.faults.append("other: a saver that is alone fails")
                self._require_complete("the last save", {4})
            if left := sorted(path.name for path in self._folder.iterdir() if path != self._target):
                messages.append(f"left beside the checkpoint: {', '.join(left)}")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _stands(self, actor: Actor, answer: Answer | None) -> bool:
        return answer is None and not actor.is_dead

    def _save(self, actor: Actor, index: int) -> Answer | None:
        actor.begin(self._policy(index))
        return actor.require(self._ground.hang, "a saver")

    def _note(self, who: str, answer: Answer | None) -> None:
        if answer is None:
            self._outcome.messages.append(f"{who}: killed")
            return
        if answer.error:
            self._outcome.messages.append(f"{who}: {answer.error[:110]}")
        if answer.crash:
            self._outcome.faults.append(f"other: the {who} saver: {answer.crash.strip().splitlines()[-1]}")

    def _require_complete(self, when: str, indices: set[int]) -> None:
        allowed = {self._policy(index): index for index in indices}
        saved = self._saved_policy()
        if saved not in allowed:
            which = {self._policy(index): f"save {index}" for index in range(1, 5)}.get(saved, "no complete checkpoint")
            self._outcome.faults.append(
                f"lost: {when}: the directory holds {which}, expected one of the saves {sorted(indices)}"
            )

    def _saved_policy(self) -> int | None:
        """The policy of which the directory holds a complete checkpoint, or `None`."""
        return self._known.get(_sha_of_checkpoint(self._target))

    def _saver(self, among: list[Actor]) -> Actor:
        ground, target = self._ground, self._target

        def make() -> Any:
            bridge = AutoBridge.from_pretrained(ground.checkpoint)
            target.parent.mkdir(exist_ok=True)

            def act(policy: int) -> None:
                _, model = light_model(VARIANT, ParallelLayout(), 0, ground.states[policy], SIZES)
                bridge.save_pretrained(model, target, shard_bytes=1 << 16, durable=False)

            return act, lambda: None, lambda: None

        return Actor(make, among)

    def _policy(self, index: int) -> int:
        return policy_of(100 * self._case.number + index)


def _sha_of_state(state: Any) -> str:
    import torch

    return _sha({name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in state.items()})


def _sha_of_checkpoint(directory: Path) -> str:
    """Of what a reader of the format would load, by own code; says what is wrong instead, where something is."""
    try:
        json.loads((directory / "config.json").read_text())
        index = directory / "model.safetensors.index.json"
        if not index.exists():
            return _sha(_tensors(directory / "model.safetensors"))
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: _tensors(directory / name) for name in set(weight_map.values())}
        return _sha({hf_name: files[file][hf_name] for hf_name, file in weight_map.items()})
    except (OSError, ValueError, KeyError, struct.error) as error:
        return f"{type(error).__name__}: {error}"


def _tensors(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + length :]
    return {name: bytes(body[entry["data_offsets"][0] : entry["data_offsets"][1]]) for name, entry in header.items()}


def _sha(tensors: dict[str, bytes]) -> str:
    state = hashlib.sha256()
    for name, data in sorted(tensors.items()):
        state.update(name.encode())
        state.update(data)
    return state.hexdigest()
