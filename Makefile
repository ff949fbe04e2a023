# make demo     set up .venv, then search on the small models that lie here
# make test     set up .venv with the test extra, then lint and run the tests, but for the slow ones
# make coverage run all tests and count the lines that they reach, which takes a quarter of an hour
# make slow     run the slow tests: a cluster that loses nodes, workers and its driver; every method as a warm start
# make lint     ruff, mypy, import floors
# make torture  kill a run at random moments (EVOMERGE_SEED) and compare its ledger with the uninterrupted one
# make claims   measure what the README claims
# make methods  build and score a model of the quickstart's sources by every method
# make speed    measure what a candidate costs to build, as a ratio to a plain copy
# make fitness  compare the estimators on simulated responses, or on those in the folder RESPONSES
# make engine   time the engine against lm-eval's own model class
# make prefixes measure what stacks that begin alike share, and what building a stack costs
# make cluster  measure two workers against one, idle workers, and what the driver costs and takes to resume
# make stacks   compare searches over stacks: edits against the published data flow space
# make search   compare drivers on stand-ins for real evaluations, hundreds of runs; --write renews docs/search.md
# make memory   compare the predicted peak of a worker's memory with the measured one
# make lines    compare every compiled method with its plain run
# make clean    remove what these targets made; runs/ stays
#
# PYTHON=python3.12 picks the interpreter of a new .venv.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

EVOMERGE_SEED ?= 0
export EVOMERGE_SEED

# Quiet, but not about errors.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

# One thread per process: the results do not depend on the number of cores, and Ray's workers do not fight over them.
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := test
.PHONY: demo test coverage slow lint torture claims methods speed fitness engine prefixes cluster stacks search memory lines clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/evomerge run experiments/quickstart.yaml

test: lint
	$(SINGLE) $(BIN)/python -m pytest -m "not slow"

coverage: $(VENV)/.installed-test
	$(SINGLE) $(BIN)/python -m pytest --cov --cov-report=term

slow: $(VENV)/.installed-test
	$(SINGLE) $(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

torture: $(VENV)/.installed-test
	$(SINGLE) $(BIN)/python tests/torture.py

claims: $(VENV)/.installed
	$(BIN)/python experiments/benchmarks/quickstart.py

methods: $(VENV)/.installed
	$(BIN)/python experiments/benchmarks/methods.py

speed: $(VENV)/.installed
	$(BIN)/python experiments/benchmarks/materialize.py

fitness: $(VENV)/.installed
	$(SINGLE) $(BIN)/python experiments/benchmarks/fitness.py $(if $(RESPONSES),--data $(RESPONSES))

engine: $(VENV)/.installed-test
	$(BIN)/python experiments/benchmarks/engine.py

prefixes: $(VENV)/.installed
	$(SINGLE) $(BIN)/python experiments/benchmarks/prefix.py

cluster: $(VENV)/.installed
	$(SINGLE) $(BIN)/python experiments/benchmarks/cluster.py

stacks: $(VENV)/.installed
	$(SINGLE) $(BIN)/python experiments/benchmarks/stacks.py

search: $(VENV)/.installed
	$(SINGLE) $(BIN)/python experiments/benchmarks/search.py

memory: $(VENV)/.installed
	$(SINGLE) $(BIN)/python experiments/benchmarks/memory.py

lines: $(VENV)/.installed-test
	$(SINGLE) EVOMERGE_EVERY_LINE=1 $(BIN)/python -m pytest tests/operators/test_fused.py -k every

clean:
	rm -rf $(VENV) build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "evomerge needs Python 3.11 or later; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was installed from. Order-only: a later touch of the interpreter asks for nothing.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes."
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV), with what the tests need; the first time takes some minutes."
	@$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed
