# `make medical` and `make test` work in a fresh clone; the first call creates .venv.

PYTHON := $(or $(PYTHON),python3)
VENV ?= .venv
CONFIG ?= configs/medical_hetero.yaml
ALGORITHMS ?= local,fedavg,fedprox,fedper,lg_fedavg,fedmd,feddf,fd,hybrid,centralized,ensemble,$\
  local:logit_adjustment=true,fedavg:logit_adjustment=true,fedmd:logit_adjustment=true,$\
  feddf:logit_adjustment=true,$\
  feddf:logit_adjustment=true:teacher=contrast,centralized:logit_adjustment=true
SEEDS ?= 0,1,2,3,4
OUT ?= runs/compare-$(basename $(notdir $(CONFIG)))

PY := $(VENV)/bin/python
# Limit busy waiting of OpenMP threads, which slows down concurrent jobs on one machine.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes that import the same modules: compile each module once.
export PYTHONDONTWRITEBYTECODE :=

.DELETE_ON_ERROR:
.PHONY: help medical test test-all coverage frozen-bits mutants check compare tables docs \
  docs-build docs-serve clean

help:
	@echo "make medical   compare four methods on six hospitals (chest X-rays) into runs/medical"
	@echo "make test      run the quick tests in parallel, before every commit"
	@echo "make test-all  run all tests, including crashes, notebooks and real federations"
	@echo "make coverage  run all tests with line coverage per package"
	@echo "make frozen-bits COMMIT=…  compare models, metrics and bytes with a commit, bit by bit"
	@echo "make mutants   insert small bugs into the code and check that the tests find them"
	@echo "make check     check formatting, lint and types"
	@echo "make compare   compare methods: CONFIG=… ALGORITHMS=… SEEDS=… SET=key=value OUT=…"
	@echo "make tables    write the tables of docs/results; FROM=\"FOLDER …\" archives runs"
	@echo "make docs      write the generated pages of docs/reference"
	@echo "make docs-build  write the documentation site to build/site"
	@echo "make docs-serve  show the site in a browser and update it while pages are edited"
	@echo "make clean     remove $(VENV) and caches, keep runs/"

medical: $(VENV)/.installed
	$(PY) scripts/compare.py --config configs/medical_hetero.yaml \
		--algorithms local,fedavg,fedmd,hybrid --out runs/medical

# One worker runs all tests of a file, so that no fixture is repeated; files with slow tests first.
# One worker more than cores, because tests of real federations wait for their processes.
WORKERS ?= $(shell $(PY) -c "import os; print((os.cpu_count() or 1) + 1)")
PYTEST = $(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

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
	$(PY) scripts/compare.py --config $(CONFIG) --algorithms $(ALGORITHMS) --seeds $(SEEDS) \
		--out $(OUT) $(SET)

tables: $(VENV)/.installed
	$(PY) scripts/result_tables.py $(if $(FROM),--archive $(FROM))

docs: $(VENV)/.installed
	$(PY) scripts/describe_reference.py

# EXECUTE_NOTEBOOKS=false builds the site without the outputs of the notebooks.
docs-build: $(VENV)/.installed-all
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

docs-serve: $(VENV)/.installed-all
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Packages are compiled when they are imported, because most modules of the large ones never are.
PIP_INSTALL := $(PY) -m pip install --quiet --no-compile --editable

# Stamp files: packages are installed again only if pyproject.toml changes.
$(VENV)/.installed: pyproject.toml $(PY)
	@echo "installing into $(VENV) once; this takes some minutes"
	$(PIP_INSTALL) '.[tables]'
	@touch $@

$(VENV)/.installed-all: pyproject.toml $(PY)
	@echo "installing into $(VENV) once; this takes some minutes"
	$(PIP_INSTALL) '.[all]'
	@touch $@ $(VENV)/.installed

$(PY):
	$(PYTHON) -m venv $(VENV)
