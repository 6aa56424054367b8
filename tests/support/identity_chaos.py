"""Identities that come round again: two real vLLM workers, trainers and savers, that stand still at any step of what they do.

    python tests/support/identity_chaos.py 300 [seed] [--load N]     # prints one line a run, and a table

An engine of two workers (`struck_engine.py`) starts once. In each run it catches up, joins, commits or is dropped while one of
its processes is stopped (SIGSTOP), or delayed, at one of the library's own lines (`strikes.py`), and the trainer goes on to
other versions; or two trainers share the name of a store, or two savers a directory, and one of them is stopped or killed. When
everybody can go on again, sha256 over the live parameters of every worker, or over a checkpoint's tensors, by code of its own
(`struck_engine.sha256_of`), says which version each of them holds. Counted are

* mixtures: an engine generates, and its workers hold different versions, or none whole;
* other versions: an engine generates, all workers hold one version, and it says another;
* lost: a directory holds neither the old checkpoint nor a new one, complete; or a store has no version any more;
* hangs: no verdict within `--hang` seconds after the last one could go on;
* others: an error that is not the library's, or an engine, saver or successor that does not come back.

A run is reproduced by `python tests/support/identity_chaos.py 1 SEED`, with the seed that its line names.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from identity_cases import FAULTS, KINDS, Case, Outcome, drawn_case
from identity_ground import Ground, Hang
from identity_processes import play_savers, play_trainers
from identity_scenes import play

_FIRST_NUMBER = 2  # versions below 200 are the ground's own


def run(ground: Ground, case: Case) -> Outcome:
    """One run; whatever goes wrong is in its outcome."""
    plays = {"two trainers": play_trainers, "two savers": play_savers}
    try:
        return plays.get(case.kind, play)(ground, case)
    except Hang as error:
        outcome = Outcome(faults=[f"hang: {error}"])
    except Exception as error:
        outcome = Outcome(faults=[f"other: {type(error).__name__}: {error}", traceback.format_exc()])
    ground.mend()
    return outcome


def runs(ground: Ground, seeds: Sequence[int]) -> Iterator[tuple[int, Case, Outcome]]:
    for number, seed in enumerate(seeds, _FIRST_NUMBER):
        case = drawn_case(seed, number)
        yield seed, case, run(ground, case)


def kinds_of(outcome: Outcome) -> list[str]:
    """The kinds of its faults, each once."""
    return [kind for kind in FAULTS if any(fault.startswith(f"{kind}:") for fault in outcome.faults)]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes spin meanwhile; they end with this one."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}:\n    sum(range(100000))"
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=300)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--load", type=int, default=0, help="processes that spin meanwhile")
    parser.add_argument("--give-up", type=float, default=1.0, help="seconds until an engine that does not answer is given up")
    parser.add_argument("--hang", type=float, default=90.0, help="seconds until a verdict that does not come is a hang")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("mbridge_rl").setLevel(logging.CRITICAL)  # what it warns of is what is done to it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mbridge_identity_") as folder:
        ground = Ground(Path(folder), arguments.give_up, arguments.hang)
        try:
            print(f"the engine is up after {time.monotonic() - started:.0f} s", flush=True)
            with busy(arguments.load):
                tally = _tallied(ground, range(arguments.seed, arguments.seed + arguments.count))
        except KeyboardInterrupt:
            ground.kill()
            raise
        finally:
            ground.close()
    _print_table(tally)
    bad = sum(times for (_, what), times in tally.items() if what in FAULTS)
    print(f"{arguments.count} runs in {time.monotonic() - started:.0f} s, {ground.starts} starts of the engine, {bad} faults")
    sys.exit(bad > 0)


def _tallied(ground: Ground, seeds: Sequence[int]) -> collections.Counter[tuple[str, str]]:
    """Prints one line for each run; returns how often each kind of run had each verdict."""
    tally: collections.Counter[tuple[str, str]] = collections.Counter()
    at = time.monotonic()
    for seed, case, outcome in runs(ground, seeds):
        tally[case.kind, "runs"] += 1
        tally[case.kind, "struck"] += bool(outcome.place)
        tally.update((case.kind, kind) for kind in kinds_of(outcome))
        who = f"worker {case.victim}" if isinstance(case.victim, int) else case.victim
        what = f"{case.action} {who} at {outcome.place or '-'}"
        seconds, load = time.monotonic() - at, os.getloadavg()[0]
        verdict = "FAULT" if outcome.faults else "ok"
        print(f"{seed:6d}  {case.kind:12s} {case.way:9s} {what:56s} {seconds:5.1f} s  load {load:3.0f}  {verdict}", flush=True)
        if outcome.faults:
            for text in outcome.faults + [f"({message})" for message in outcome.messages]:
                print(f"        {text}", flush=True)
        at = time.monotonic()
    return tally


def _print_table(tally: collections.Counter[tuple[str, str]]) -> None:
    columns = ("runs", "struck", *FAULTS)
    print(f"{'':14s}" + "".join(f"{column:>15s}" for column in columns))
    for kind in KINDS:
        print(f"{kind:14s}" + "".join(f"{tally[kind, column]:15d}" for column in columns))
    print(f"{'together':14s}" + "".join(f"{sum(tally[kind, column] for kind in KINDS):15d}" for column in columns))


if __name__ == "__main__":
    main()
