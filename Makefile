# `make medical` and `make test` work from a fresh clone: each sets up .venv on first use, then runs.

PYTHON := $(or $(PYTHON),python3)
VENV ?= .venv
CONFIG ?= configs/medical_hetero.yaml
ALGORITHMS ?= local,fedavg,fedprox,fedper,lg_fedavg,fedmd,feddf,fd,hybrid,centralized,ensemble,$\
  local:logit_adjustment=true,fedavg:logit_adjustment=true,fedmd:logit_adjustment=true,feddf:logit_adjustment=true,$\
  feddf:logit_adjustment=true:teacher=contrast,centralized:logit_adjustment=true
SEEDS ?= 0,1,2,3,4
OUT ?= runs/compare-$(basename $(notdir $(CONFIG)))

PY := $(VENV)/bin/python
# Threads that wait for one another spin for a moment only: two jobs on one machine would crawl.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes that import the same modules: compile each module once.
export PYTHONDONTWRITEBYTECODE :=

.DELETE_ON_ERROR:
.PHONY: help medical test test-all coverage frozen-bits mutants check compare tables docs clean

help:
	@echo "make medical   the main job: six hospitals, chest X-rays, into runs/"
	@echo "make test      the quick tests, in parallel; run them before every commit"
	@echo "make test-all  all tests: also crashes, notebooks, commands of the documentation, real federations"
	@echo "make coverage  all tests, with line coverage per package"
	@echo "make frozen-bits COMMIT=…  compare models, metrics and bytes with those of a commit, bit for bit"
	@echo "make mutants   put small bugs into the code and check that the tests find each one"
	@echo "make check     formatting, lint and types"
	@echo "make compare   CONFIG=$(CONFIG) ALGORITHMS=… SEEDS=$(SEEDS) SET=key=value, into $(OUT)"
	@echo "make tables    the result tables of README.md, from docs/results; FROM=\"FOLDER …\" archives comparisons first"
	@echo "make docs      docs/configuration.md, from the schema"
	@echo "make clean     remove $(VENV) and caches, keep runs/"

medical: $(VENV)/.installed
	$(PY) scripts/train.py --config configs/medical_hetero.yaml

# Workers start with a contiguous share of the tests, so that fixtures of a module are rarely built twice.
PYTEST := $(PY) -m pytest --numprocesses auto --dist worksteal

test: $(VENV)/.installed-all
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-all
	$(PYTEST)

coverage: $(VENV)/.installed-all
	$(PYTEST) $(if $(QUICK),-m "not slow") --cov --cov-report=
	$(PY) -m coverage report

frozen-bits: $(VENV)/.installed-all
	$(PY) -m tests.frozen_bits $(COMMIT)

mutants: $(VENV)/.installed-all
	$(PY) -m tests.mutants

check: $(VENV)/.installed-all
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

compare: $(VENV)/.installed
	$(PY) scripts/compare.py --config $(CONFIG) --algorithms $(ALGORITHMS) --seeds $(SEEDS) --out $(OUT) $(SET)

tables: $(VENV)/.installed
	$(PY) scripts/result_tables.py $(if $(FROM),--archive $(FROM))

docs: $(VENV)/.installed
	$(PY) scripts/describe_config.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Stamps: what is installed is not installed again until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml $(PY)
	@echo "installing into $(VENV), once; this takes some minutes"
	$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-all: pyproject.toml $(PY)
	@echo "installing into $(VENV), once; this takes some minutes"
	$(PY) -m pip install --quiet --editable '.[all]'
	@touch $@ $(VENV)/.installed

$(PY):
	$(PYTHON) -m venv $(VENV)
