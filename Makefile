SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?=
ifeq ($(DATA),)
DEMO_DIR ?= data/demo
else
DEMO_DIR ?= data/demo-$(notdir $(patsubst %/,%,$(DATA)))
endif
# `make ui` shows SPYMASTER_DATA_DIR if it is set, else the demo that ran last.
UI_DIR = $(or $(SPYMASTER_DATA_DIR),$(shell cat data/.last-demo 2>/dev/null),data)
export DAGSTER_DISABLE_TELEMETRY := 1

.PHONY: setup demo test nightly ui bench lint clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: install it or run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/spymaster demo --root $(DEMO_DIR) $(if $(DATA),--data $(DATA),)
	@mkdir -p data && echo $(DEMO_DIR) > data/.last-demo

test: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 --dist loadgroup

nightly: setup
	SPYMASTER_FUZZ=60000 SPYMASTER_TRAPS=6,200 SPYMASTER_CANARY_FOLDS=300 SPYMASTER_PROVE_CUTS=256 SPYMASTER_KILLS=200 \
		$(BIN)/python -m pytest -n 2 --dist loadgroup

ui: setup
	mkdir -p $(UI_DIR)/dagster_home && cp dagster.yaml $(UI_DIR)/dagster_home/
	env -u DAGSTER_MODULE_NAME SPYMASTER_DATA_DIR=$(UI_DIR) DAGSTER_HOME=$(abspath $(UI_DIR))/dagster_home \
		$(BIN)/dagster dev -w workspace.yaml

bench: setup
	$(BIN)/python -m benchmarks

lint: setup
	$(BIN)/python -m ruff format --check . && $(BIN)/python -m ruff check . && $(BIN)/python -m mypy

clean:
	rm -rf $(VENV) data build *.egg-info
