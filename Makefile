# `make` alone lists the targets. Everything runs in .venv, made on first use.

PYTHON =
VENV = .venv
WORKFLOW = workflows/liver.yaml
TESTS_AT_ONCE = auto

# The pins in constraints.txt were resolved on 3.11, so it comes first; PYTHON=/path/to/python goes before all.
PYTHONS = $(PYTHON) python3.11 python3.12 python3.13 python3
INSTALLED = $(VENV)/installed

.PHONY: help setup train test test-all lint format bench

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: $(INSTALLED) ## make .venv and install medseg in it, once and again when the pins change

$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	    for python in $(PYTHONS); do \
	        if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	            echo "making $(VENV) with $$python; the installation downloads a few hundred MB, with CUDA a few GB"; \
	            "$$python" -m venv --clear $(VENV) || exit 1; \
	            break; \
	        fi; \
	    done; \
	fi
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { \
	    echo "medseg needs Python 3.11 or newer with its venv module; tried: $(PYTHONS)." >&2; \
	    echo "Install one (on Debian or Ubuntu: apt install python3 python3-venv) or name it: make setup PYTHON=/path/to/python" >&2; \
	    exit 2; }
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(INSTALLED)

train: setup ## train WORKFLOW (workflows/liver.yaml); ARGS="--set train.iterations=100" adds arguments
	$(VENV)/bin/medseg train $(WORKFLOW) $(ARGS)

test: setup ## the default tests, in a few minutes on two cores
	$(VENV)/bin/python -m pytest -n $(TESTS_AT_ONCE) --maxprocesses 8 $(ARGS)

test-all: setup ## the slow tests too
	$(VENV)/bin/python -m pytest -n $(TESTS_AT_ONCE) --maxprocesses 8 -m "" $(ARGS)

lint: setup ## ruff, mypy and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: setup ## every performance claim beside its peer; long
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev,bench]"
	@for script in benchmarks/*.py; do echo "== $$script"; $(VENV)/bin/python "$$script" || exit 1; done
