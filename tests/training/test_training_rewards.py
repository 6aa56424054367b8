"""Rewards that fail in every way: each is named and costs its own completion only."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from reward_service import reward_service, url_of

from mbridge_rl.training.rollout import toy
from mbridge_rl.training.rollout.reward_pool import PoolJudge
from mbridge_rl.training.rollout.rewards import (
    HTTPJudge,
    InProcessJudge,
    Problem,
    RewardFunction,
    Verdict,
    exact_match,
    math_verify,
)
from mbridge_rl.training.run.config import RewardConfig, TaskConfig
from mbridge_rl.training.run.config_file import ConfigError
from mbridge_rl.training.run.tasks import make_judge, make_task, reward_function, usable_problems


def treacherous(problem: Problem, completion: str) -> float:
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(3)
    return {"nan": float("nan"), "inf": float("inf")}.get(completion, float(completion == problem.answer))


def make_treacherous() -> RewardFunction:
    return treacherous


def _ask(judge: Any, *completions: str) -> list[Verdict]:
    return judge.judge([(Problem("1+1=", "2"), completion) for completion in completions])


def test_what_fails_in_this_process_is_named() -> None:
    right, wrong, raised, nan, infinite = _ask(InProcessJudge(treacherous), "2", "3", "raise", "nan", "inf")
    assert (right, wrong) == (Verdict(1.0), Verdict(0.0))
    assert raised == Verdict(0.0, "reward treacherous raised KeyError: 'no such thing'")
    assert nan.error == "reward treacherous is nan, which is no finite number"
    assert infinite.error is not None


def test_a_pool_survives_rewards_that_hang_or_die() -> None:
    judge = PoolJudge(partial(make_treacherous), workers=2, timeout=2)
    try:
        assert _ask(judge, "2", "3") == [Verdict(1.0), Verdict(0.0)]  # both workers are up
        verdicts = _ask(judge, "2", "hang", "raise", "die", "nan", "3", "2")
        assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        errors = [verdict.error for verdict in verdicts]
        assert errors[0] is errors[5] is errors[6] is None
        assert errors[1] == "the reward took longer than 2 s; its worker was ended"
        assert "KeyError" in str(errors[2])
        assert errors[3] == "the reward's worker died (exit status 3)"
        assert "nan" in str(errors[4])
        workers = [worker._process for worker in judge._workers]
    finally:
        judge.close()
    assert all(worker.poll() is not None for worker in workers)


def test_a_pool_whose_function_cannot_be_made_says_so() -> None:
    judge = PoolJudge(partial(reward_function, TaskConfig(), RewardConfig("no.such:thing")), workers=1, timeout=2)
    try:
        (verdict,) = _ask(judge, "2")
    finally:
        judge.close()
    assert verdict.error is not None
    assert "reward.function: 'no.such:thing' cannot be imported" in verdict.error


def test_a_service_rewards_and_its_failures_are_named() -> None:
    with reward_service() as service:
        judge = make_judge(TaskConfig(), RewardConfig(url_of(service)))
        assert isinstance(judge, HTTPJudge)
        assert _ask(judge, "2", "3") == [Verdict(1.0), Verdict(0.0)]
        assert [verdict.error is None for verdict in _ask(judge, "2", "?")] == [True, False]
        assert all("1 rewards for 2 completions" in (verdict.error or "") for verdict in _ask(judge, "short", "2"))
        assert all("HTTP Error 500" in (verdict.error or "") for verdict in _ask(judge, "broken", "2"))
    assert all("refused" in (verdict.error or "") for verdict in _ask(judge, "2"))


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def nonsense(problem: Problem, completion: str) -> Any:
    if completion == "exit":
        raise SystemExit(3)
    if completion == "unprintable":
        raise Unprintable
    if completion == "long":
        raise ValueError("[/INST]" * 100_000)
    if completion == "hang":
        time.sleep(3600)
    values: dict[str, Any] = {
        "text": "1",
        "none": None,
        "complex": 1j,
        "list": [1],
        "huge": 10**400,
        "true": True,
        "tensor": torch.tensor(0.5),
    }
    return values.get(completion, 1.0)


def make_nonsense() -> RewardFunction:
    return nonsense


@pytest.mark.parametrize("completion", ["exit", "unprintable", "long", "text", "none", "complex", "list", "huge"])
def test_whatever_a_function_does_is_a_verdict(completion: str) -> None:
    judge = InProcessJudge(nonsense)
    bad, good = _ask(judge, completion, "2")
    judge.close()
    assert good == Verdict(1.0)
    assert bad.reward == 0.0
    assert bad.error is not None
    assert len(bad.error) < 600


def test_numbers_of_every_type_are_rewards() -> None:
    assert _ask(InProcessJudge(nonsense), "true", "tensor") == [Verdict(1.0), Verdict(0.5)]


def test_a_function_that_hangs_costs_its_completions_and_no_more() -> None:
    judge = InProcessJudge(nonsense, timeout=0.2)
    verdicts = _ask(judge, "2", "hang", "2", *["hang"] * 5, "2")
    judge.close()
    assert [verdict.error is None for verdict in verdicts] == [True, False, True, *[False] * 6]
    assert "took longer than 0.2 s; set reward.workers" in str(verdicts[1].error)
    assert "4 calls of the reward still hang, no more are made" in str(verdicts[-1].error)


def test_a_problem_that_cannot_be_sent_costs_its_own_completion() -> None:
    problem = Problem("1+1=", "2", {"reward": lambda: 1.0})
    judge = PoolJudge(partial(make_treacherous), workers=1, timeout=2)
    try:
        unsent, right = judge.judge([(problem, "2"), (Problem("1+1=", "2"), "2")])
    finally:
        judge.close()
    assert "cannot be sent to a worker" in str(unsent.error)
    assert right == Verdict(1.0)
    cyclic: dict[str, Any] = {}
    cyclic["itself"] = cyclic
    (failed,) = HTTPJudge("http://127.0.0.1:9/").judge([(Problem("1+1=", "2", cyclic), "2")])
    assert "Circular reference" in str(failed.error)


def _read_request(connection: socket.socket) -> None:
    """All of it: what is left unread resets the connection when it is closed."""
    with connection.makefile("rb") as file:
        length = 0
        while (line := file.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length"):
                length = int(line.split(b":")[1])
        file.read(length)


@contextmanager
def service(*sent: bytes, pause: float = 0.0) -> Iterator[str]:
    """Takes connections, and sends these parts with pauses between them, to each; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    _read_request(connection)
                    for part in sent:
                        connection.sendall(part)
                        time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


OK = b"HTTP/1.0 200 OK\r\n\r\n"
MISBEHAVIOUR: dict[str, tuple[tuple[bytes, ...], str]] = {
    "no HTTP": ((b"\x16\x03\x01garbage\r\n\r\n",), "BadStatusLine"),
    "long status": ((b"HTTP/1.1 " + b"2" * 70_000 + b"\r\n\r\n",), "LineTooLong"),
    "many fields": ((b"HTTP/1.1 200 OK\r\n" + b"x: 1\r\n" * 300 + b"\r\n{}",), "more than 100 headers"),
    "cut short": ((b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",), "no JSON"),
    "closes": ((), "RemoteDisconnected"),
    "redirect": ((b"HTTP/1.1 302 F\r\nLocation: file:///etc/passwd\r\n\r\n",), "HTTP Error 302"),
    "nested": ((OK + b"[" * 100_000,), "nested more than 32 levels deep"),
    "a list": ((OK + b"[1, 0]",), "is needed, found"),
    "text": ((OK + b'{"rewards": "10"}',), "is needed, found"),
    "a mapping": ((OK + b'{"rewards": {"1": 2, "3": 4}}',), "is needed, found"),
    "twice": ((OK + b'{"rewards": [1, 1], "rewards": [0, 0]}',), "stands twice"),
    "not UTF-8": ((OK + b"\xff\xff",), "no UTF-8"),
    "flood": ((OK, *[b" " * (1 << 20)] * 8), "more than"),
    "markup": ((b"HTTP/1.1 500 E\r\n\r\n[/INST]",), "HTTP Error 500: [/INST]"),
}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_a_service_that_misbehaves_costs_the_batch_its_rewards(name: str) -> None:
    sent, message = MISBEHAVIOUR[name]
    with service(*sent) as url:
        verdicts = _ask(HTTPJudge(url, timeout=60.0), "2", "3")
    assert [verdict.reward for verdict in verdicts] == [0.0, 0.0]
    assert all(message in (verdict.error or "") for verdict in verdicts), verdicts


@pytest.mark.parametrize("sent", [(OK, *[b" "] * 600), (*[b"x"] * 600,), (*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 600,)])
def test_a_service_that_drips_is_not_waited_for(sent: tuple[bytes, ...]) -> None:
    """Every single read gets its byte in time, but the complete answer would take a minute."""
    threads = threading.active_count()
    with service(*sent, pause=0.1) as url:
        verdicts = _ask(HTTPJudge(url, timeout=0.5), "2", "3")
        assert all("no complete answer within 0.5 s" in (verdict.error or "") for verdict in verdicts)
        deadline = time.monotonic() + 60
        while threading.active_count() > threads + 1 and time.monotonic() < deadline:  # one of them is the service's own
            time.sleep(0.05)
        assert threading.active_count() <= threads + 1, "the request's thread outlived it"


@pytest.mark.parametrize("reward", ['"1"', "true", "[1]", "{}", "NaN", "-Infinity", "1" + "0" * 400, "null"])
def test_one_reward_that_is_no_number_costs_its_own_completion(reward: str) -> None:
    with service(OK + f'{{"rewards": [{reward}, 0.5]}}'.encode()) as url:
        bad, good = _ask(HTTPJudge(url), "2", "3")
    assert good == Verdict(0.5)
    assert bad.reward == 0.0
    assert bad.error


def test_math_verify_knows_equal_expressions() -> None:
    pytest.importorskip("math_verify")
    problem = Problem("How much is a half?", r"\frac{1}{2}")
    assert math_verify(problem, "It is $0.5$.") == 1.0
    assert math_verify(problem, r"The answer is \boxed{\frac{2}{4}}") == 1.0
    assert math_verify(problem, "It is $0.6$.") == 0.0
    assert InProcessJudge(math_verify).judge([(Problem("?", ""), "1")])[0].error is not None


def test_reasoning_gym_brings_problems_and_their_reward() -> None:
    pytest.importorskip("reasoning_gym")
    config = TaskConfig(
        "reasoning-gym",
        "chain_sum",
        size=20,
        options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        prompt="{metadata[expression]}=",
    )
    task = make_task(config)
    assert len(task.problems) == 20
    assert all(eval(problem.prompt[:-1]) == int(problem.answer) for problem in task.problems)
    reward = reward_function(config, RewardConfig())
    assert [reward(problem, f" {problem.answer}") for problem in task.problems] == [1.0] * 20
    assert reward(task.problems[0], "x") < 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig("reasoning-gym", "chain_sums"), "reasoning-gym has no 'chain_sums'"),
        (TaskConfig("reasoning-gym", "chain_sum", options={"no_such": 1}), "task.options: .*refuses them"),
        (TaskConfig("jsonl", "/nowhere.jsonl"), "task.dataset: /nowhere.jsonl: No such file"),
        (TaskConfig("python", "json"), "write module:name"),
        (TaskConfig(prompt="{metadata[level]}"), "task.prompt: .*does not fit a problem: KeyError: 'level'"),
    ],
)
def test_tasks_that_do_not_exist_are_refused(config: TaskConfig, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match=message):
        make_task(config)


def test_tasks_from_files_and_functions(tmp_path: Any) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"question": "a", "answer": 1}\n\n{"question": "b"}\n')
    assert make_task(TaskConfig("jsonl", str(path), prompt="Q {question}\n")).problems == [
        Problem("Q a\n", "1"),
        Problem("Q b\n", ""),
    ]
    assert make_task(TaskConfig("python", "mbridge_rl.training.rollout.toy:sums", size=3)).problems[2] == Problem("0+2=", "2")
    assert reward_function(TaskConfig(), RewardConfig("mbridge_rl.training.rollout.rewards:exact_match")) is exact_match
    path.write_text('{"question": "a"}\n{"answer": 1}\n')
    with pytest.raises(ConfigError, match="line 2"):
        make_task(TaskConfig("jsonl", str(path)))


def test_prompts_that_do_not_fit_are_left_out_and_counted_or_refused() -> None:
    tokenizer = toy.tokenizer()
    problems = [Problem("1+1="), Problem(""), Problem("1+1+1+1="), Problem("2+2=")]
    usable, left_out = usable_problems(problems, tokenizer, 4, refuse=False)
    assert usable == [problems[0], problems[3]]
    assert left_out == {"empty": 1, "longer than 4 tokens": 1}
    with pytest.raises(ConfigError, match=r"the prompt '' has 0 tokens, 1 to 4 are allowed"):
        usable_problems(problems, tokenizer, 4, refuse=True)
    with pytest.raises(ConfigError, match=r"none of 4 prompts has 1 to 3 tokens"):
        usable_problems(problems, tokenizer, 3, refuse=False)
