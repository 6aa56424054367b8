"""`make matrix`: the tests of `tools/matrix.py` in every environment of it, each in a virtual environment under `.nox`.

    nox --list
    nox --session py312-megatron019

The results are in `runs/matrix`, for `tools/compatibility_table.py`. PIP_ARGS is passed to pip as it is by `make venv`, and
TEST_WORKERS is the number of processes that tests are dealt to. An environment takes up to 7 GB where torch is PyPI's build.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

from matrix import ENVIRONMENTS, RESULTS, Environment  # noqa: E402

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True


def run(session: nox.Session, environment: Environment) -> None:
    """Installs one environment, unless `--no-install` was given and it is there, and runs its tests."""
    results = RESULTS / environment.name
    RESULTS.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".xml").unlink(missing_ok=True)  # what is left of an earlier run says nothing about this one
    pinned = [argument for requirement in environment.requirements for argument in ("--with", requirement)]
    pip_arguments = shlex.split(os.environ.get("PIP_ARGS", ""))
    session.run_install("python", "tools/install.py", "--extras", environment.extras(), *pinned, *pip_arguments)
    session.run("python", "tools/matrix.py", f"{results}.json")
    tests = [test for tests in environment.groups().values() for test in tests]
    workers = ("-n", os.environ.get("TEST_WORKERS", "2"), "--dist", "loadfile")
    session.run("python", "-m", "pytest", *workers, f"--junitxml={results}.xml", *tests, *session.posargs)


def _session(environment: Environment) -> None:
    def session(session: nox.Session) -> None:
        run(session, environment)

    session.__doc__ = f"Python {environment.python}, {', '.join(environment.requirements) or 'the newest of everything'}"
    nox.session(session, name=environment.name, python=environment.python)


for _environment in ENVIRONMENTS:
    _session(_environment)
