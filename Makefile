# One command each; `make help` lists them. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup train study test check format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: .venv/.installed ## create .venv and install everything (once)

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "frugal needs Python 3.11 or newer: set PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about two minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

train: setup ## train the embedded default: a small MoE on the King James Bible (CPU, minutes, offline)
	@$(BIN)/python train.py fit

study: setup ## a savings study in minutes: five techniques, and four together, against a plain baseline
	@$(BIN)/frugal savings configs/studies/quick.yaml --jobs 2

test: setup ## run the whole test suite
	@$(BIN)/python -m pytest -n auto --nbmake tests notebooks

check: setup ## lint, formatting and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: setup ## format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove caches (not runs/, not .venv)
	@rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis && find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
