# Everything here needs python3 (3.11 or newer, with venv) and make; the rest is installed in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test parity lint types

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## unlearn with the small model of this repository; writes out/demo
	$(BIN)/python -m demo.run_demo

test: $(VENV)/.installed ## run the tests, two files at a time
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

parity: $(VENV)/.parity ## run the tests that compare with PyTorch, which is installed for them
	$(BIN)/pytest -m parity

lint: $(VENV)/.installed ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed ## check types
	$(BIN)/mypy

# The stamps keep make from installing again until pyproject.toml changes. Python compiles what is used
# when it is used (--no-compile): far less than there is.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a minute or two."
	$(BIN)/pip install --quiet --no-compile --editable '.[test]'
	@touch $@

$(VENV)/.parity: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile --editable '.[test,parity]'
	@touch $@
