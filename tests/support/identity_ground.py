"""What all runs of `identity_chaos.py` stand on: an engine of two vLLM workers that starts once, replicas of plain tensors, a
trainer without Megatron, and what each worker holds for each of some policies, learnt from syncs that nobody disturbs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from standin import Latch, PlainModel, StandInEngine, light_model, set_weights
from strikes import Reached, go_on
from struck_engine import StruckProcess, sha256_of
from tiny import hf_state, tiny_checkpoint
from torch import Tensor

from mbridge_rl.core.errors import BridgeError, EngineUnusable
from mbridge_rl.core.layout import ParallelLayout
from mbridge_rl.sync.payload.messages import Announcement, Introduction, WorkerDescription
from mbridge_rl.sync.weight_sync import WeightSync
from mbridge_rl.sync.worker.payload_receiver import PayloadReceiver
from mbridge_rl.sync.worker.serving_state import Serving

VARIANT = "qwen3"
SIZES = {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 131}  # fmt: skip
POLICIES = 8
PROMPT = [1, 2, 3]
_LONG = 900.0  # of a call that nobody struck


def policy_of(version: int) -> int:
    """Which of the policies a version is. Versions `100 * run + 1 ... 100 * run + 7` of one run are different ones."""
    return (3 * (version // 100) + version) % POLICIES


class Hang(AssertionError):
    """Nobody is held up any more, and still there is no verdict."""


@dataclass(frozen=True)
class Look:
    """What an engine holds, and what it states about itself, at one moment.

    Attributes:
        held: the policy that each worker holds whole; `None` for none of them.
        version: that the engine says it serves.
        refusal: why it does not generate; empty if it does.
        answered: the policy whose answers its answers are, -1 for none; `None` where it was not asked.
        token_versions: that its answers say they are of.
    """

    held: tuple[int | None, ...]
    version: int
    refusal: str = ""
    answered: int | None = None
    token_versions: frozenset[int] = frozenset()

    def fault(self, initial: int | None = None) -> str:
        """The name of the fault, or an empty string for a sound engine.

        Args:
            initial: the version of weights that no trainer has sent, if the engine may still serve them.
        """
        if self.refusal or (initial is not None and self.version == initial):
            return ""
        if len(set(self.held)) > 1 or None in self.held or self.answered not in (None, self.held[0]):
            return "mixture"
        stated_versions = {self.version, *self.token_versions}
        return "" if {policy_of(version) for version in stated_versions} == {self.held[0]} else "other version"


class _Parameters:
    """A worker of a replica: tensors under a real worker's names."""

    def __init__(self, shapes: Mapping[str, tuple[Sequence[int], str]]) -> None:
        self._tensors = {
            name: torch.zeros(tuple(shape), dtype=getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()
        }

    def parameters_by_name(self) -> dict[str, Tensor]:
        return self._tensors


class Replica(StandInEngine):
    """A replica of the real engine, in any process: plain tensors of the same names and shapes, and the library's receiver."""

    def __init__(self, described: list[WorkerDescription], parameters: Sequence[Mapping[str, Any]]) -> None:
        self._described = described
        self.workers = [_Parameters(shapes) for shapes in parameters]  # type: ignore[misc]
        self.receivers = [PayloadReceiver(PlainModel(worker), Serving(Latch())) for worker in self.workers]  # type: ignore[arg-type]
        self.version, self._watch = 0, None

    def describe(self, announcement: Announcement) -> list[WorkerDescription]:
        return self._described

    def shas(self) -> list[str]:
        return [sha256_of(worker.parameters_by_name().items()) for worker in self.workers]

    def refusal(self) -> str:
        return next((str(receiver.serving.guard.reason) for receiver in self.receivers if receiver.serving.guard.reason), "")


class Trainer:
    """One rank, without Megatron."""

    def __init__(self, states: Sequence[Mapping[str, Tensor]], engines: Sequence[Any], **options: Any) -> None:
        self._states = states
        self._bridge, self._model = light_model(VARIANT, ParallelLayout(), 0, states[0], SIZES)
        self.sync = WeightSync(self._bridge, self._model, list(engines), bucket_bytes=1 << 14, **options)

    def commit(self, version: int) -> None:
        set_weights(self._bridge, self._model, 0, self._states[policy_of(version)])
        self.sync.sync(version)

    def commits(self, versions: Sequence[int], errors: list[BaseException]) -> None:
        """One version after the other, whatever becomes of them."""
        for version in versions:
            try:
                self.commit(version)
            except BridgeError as error:
                errors.append(error)

    def close(self) -> None:
        self.sync.close()


class Call(threading.Thread):
    """A call beside others; `result` waits for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._answer: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._answer = self._function()
        except BaseException as error:
            self.error = error

    def result(self, seconds: float, what: str) -> Any:
        """
        Raises:
            Hang: it has not ended in time. BridgeError, Exception: its own.
        """
        self.join(seconds)
        if self.is_alive():
            raise Hang(f"{what} has not ended {seconds:g} s after everybody could go on")
        if self.error is not None:
            raise self.error
        return self._answer


class Ground:
    """
    Args:
        folder: for the checkpoint.
        give_up: seconds after which a trainer gives up an engine that does not answer.
        hang: seconds within which there has to be a verdict once everybody can go on.
    """

    def __init__(self, folder: Path, give_up: float = 1.0, hang: float = 60.0) -> None:
        self.folder, self.give_up, self.hang = folder, give_up, hang
        self.checkpoint, _ = tiny_checkpoint(folder / "checkpoint", VARIANT, **SIZES)
        first = hf_state(self.checkpoint)
        self.states = [{name: _shifted(tensor, seed) for name, tensor in first.items()} for seed in range(POLICIES)]
        self.steps: dict[Any, Reached] = {}  # of undisturbed runs, by what they were
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        arguments: dict[str, Any] = {"max_model_len": 32, "max_num_seqs": 4, "kv_cache_bytes": 1 << 22}
        self.engine = StruckProcess(self.checkpoint, tensor_parallel_size=2, start_timeout=900.0, **arguments).start()
        self.engine.wait_ready()
        self.engine.set_call_timeout(_LONG)
        self.pids: dict[Any, int] = self.engine.ask("pids")
        self._learn()

    def _learn(self) -> None:
        """What each worker holds for each policy, and what the engine answers, of syncs that nobody disturbs."""
        trainer = Trainer(self.states, [self.engine])
        introduction = Introduction.from_json(trainer.sync.store.description(trainer.sync.route.fingerprint))
        self.described = self.engine.describe(introduction.announcement)
        self.parameters = self.engine.ask("parameters")
        trainer.close()
        replica = Replica(self.described, self.parameters)
        trainer = Trainer(self.states, [self.engine, replica])
        self._workers_hold, self._replica_holds, self._answers = {}, {}, {}
        for version in range(100, 100 + POLICIES):
            trainer.commit(version)
            self._workers_hold[policy_of(version)] = self.engine.ask("shas")
            self._replica_holds[policy_of(version)] = replica.shas()
            self._answers[policy_of(version)] = self._answer()[0]
        trainer.close()
        self.serves = 100 + POLICIES - 1
        for known in (self._workers_hold, self._replica_holds):
            assert all(len({shas[worker] for shas in known.values()}) == POLICIES for worker in range(2)), known
        assert len({repr(answer) for answer in self._answers.values()}) == POLICIES

    def mend(self) -> None:
        """After a run that did not end as it should: an engine that does not answer is another one from now on."""
        for pid in self.pids.values():
            go_on(pid)
        hang, self.hang = self.hang, min(self.hang, 20.0)
        try:
            self.look()
        except (BridgeError, AssertionError):
            self.kill()
            self._start()
        finally:
            self.hang = hang

    def kill(self) -> None:
        """Whatever it is at."""
        for pid in self.pids.values():
            _kill(pid)
        self.engine.close(1.0)

    def close(self) -> None:
        self.engine.close()

    def look(self) -> Look:
        """Looks at the engine, which nobody else calls any more by now."""
        self.engine.set_call_timeout(self.hang)
        try:
            self._until_idle()
            held = tuple(
                next((policy for policy, shas in self._workers_hold.items() if shas[worker] == sha), None)
                for worker, sha in enumerate(self.engine.ask("shas"))
            )
            version = self.engine.weight_version
            try:
                answer, versions = self._answer()
            except EngineUnusable as error:
                return Look(held, version, str(error))
            answered = next((policy for policy, known in self._answers.items() if known == answer), -1)
            return Look(held, version, "", answered, frozenset(versions))
        finally:
            self.engine.set_call_timeout(_LONG)

    def look_at(self, version: int, shas: Sequence[str], refusal: str) -> Look:
        """At a replica, by what it says of itself and its hashes."""
        held = tuple(
            next((policy for policy, known in self._replica_holds.items() if known[worker] == sha), None)
            for worker, sha in enumerate(shas)
        )
        return Look(held, version, refusal)

    def replica(self) -> Replica:
        return Replica(self.described, self.parameters)

    def _until_idle(self) -> None:
        """Calls that their trainer has given up may still be at work."""
        deadline = time.monotonic() + self.hang
        while self.engine.ask("active"):
            if time.monotonic() > deadline:
                raise Hang(f"calls are still at work in the engine after {self.hang:g} s")
            time.sleep(0.01)

    def _answer(self) -> tuple[Any, set[int]]:
        completion = self.engine.generate([PROMPT], max_tokens=3, temperature=0.0)[0]
        return (completion.tokens, completion.logprobs), set(completion.token_versions)


def _shifted(tensor: Tensor, seed: int) -> Tensor:
    """Another policy: other values in one of twenty elements, so that a delta between two is smaller than a policy."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tensor.shape, generator=generator) < 0.05
    return torch.where(chosen, tensor + 0.3 * torch.randn(tensor.shape, generator=generator), tensor)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
