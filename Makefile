# Everything runs in the project's own .venv, made from the pins in constraints.txt.
PYTHON ?= python3
CONFIG ?= configs/tiny.yaml
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup train test test-plan test-faults check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## make .venv with the pinned run-time dependencies

train: .venv/.installed ## prepare the embedded corpus, train a small GPT-1 on it, evaluate, sample (CONFIG=FILE for another)
	@$(BIN)/gpt1 train $(CONFIG)

test: .venv/.installed-test ## run the tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile -m 'not full_size and not fault'

test-plan: .venv/.installed-test ## plan the paper's model on 16 TPU chips, and hold the plan to its bounds
	@$(BIN)/python -m pytest -m full_size

test-faults: .venv/.installed-test ## kill, damage, fill and starve runs for real, and print what held
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist worksteal -m fault tests/faults

check: .venv/.installed-check ## lint, format, types, the direction of imports, and the files of deploy/
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check
	@$(BIN)/lint-imports
	@$(BIN)/shellcheck deploy/*.sh deploy/*.sbatch
	@$(BIN)/hadolint deploy/Dockerfile

bench: .venv/.installed-bench ## measure tokenizer, loader, attention and train step beside their peers
	@for script in tokenize loader attention train_step; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean: ## remove .venv and caches; runs and prepared corpora stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python setup.cfg pyproject.toml constraints.txt
	@echo "installing the pinned dependencies into .venv (a minute or two, once)"
	@$(PIP) --editable .
	@touch $@

.venv/.installed-%: .venv/.installed
	@$(PIP) --editable '.[$*]'
	@touch $@

.PRECIOUS: .venv/.installed-%
