# make setup      .venv with what users need, by uv where it is there, else by pip
# make setup-dev  the same and the developers' tools: pytest, mypy, ruff, import-linter
# make demo   the whole chain on this machine, a few minutes
# make test   the tests (as root on Debian/Ubuntu Slurm is installed first; elsewhere its tests say that they are skipped)
# make test-slurm   the longest cases on a real Slurm: time limits, lost nodes, a lost controller
# Both run files side by side. One alone: .venv/bin/python -m pytest tests/launch/test_local_scheduler.py
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ifneq ($(shell command -v uv),)
INSTALL := uv pip install --python $(BIN)/python --constraint constraints.txt
else
INSTALL := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt
endif
DATA   ?=
# Workers: two more than there are cores, since the Slurm tests mostly wait; those of test-slurm wait most of all
WORKERS = $(shell $(BIN)/python -c 'import os; print(min(len(os.sched_getaffinity(0)) + 2, 8))')
SIDE_BY_SIDE := --dist loadfile --no-loadscope-reorder --durations 15
ifeq ($(DATA),)
DEMO_TEXT := demo/text
DEMO_RUN  := runs/demo
else
DEMO_TEXT := $(abspath $(DATA))
DEMO_RUN  := runs/demo-$(notdir $(DEMO_TEXT))
endif

.PHONY: setup setup-dev demo test test-slurm check bench clean

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null \
	  || { echo "error: there is no command $(PYTHON) here. Name a Python of version 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.10 or newer is needed. Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# text-dedup is installed without its own list of dependencies, see the extra of this name in pyproject.toml.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Setting up $(VENV): about 2 GB, most of it PyTorch."
	$(INSTALL) --editable '.[text-dedup]'
	$(INSTALL) --no-deps text-dedup
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed
	$(INSTALL) --editable '.[text-dedup,dev]'
	@touch $@

demo: setup
	$(BIN)/python demo/base_model.py --text $(DEMO_TEXT) --output $(DEMO_RUN)-base
	DATA=$(DEMO_TEXT) DEMO_BASE=$(DEMO_RUN)-base $(BIN)/python jobs/submit_all.py \
	  --recipe recipes/demo.yaml --run-dir $(DEMO_RUN) --scheduler local
	$(BIN)/python demo/summary.py $(DEMO_RUN)

test: setup-dev
	@sbatch/install_slurm.sh
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(SIDE_BY_SIDE)

test-slurm: setup-dev
	@sbatch/install_slurm.sh
	$(BIN)/python -m pytest -m slow -n 6 $(SIDE_BY_SIDE)

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup-dev
	@ls benchmarks/*.py >/dev/null 2>&1 && for one in benchmarks/*.py; do $(BIN)/python $$one || exit 1; done \
	  || { echo "error: a benchmark failed, or there is none in benchmarks/" >&2; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info
