# The commands of this repository. Nothing is needed but make, git and Python 3.11 or newer: `make help`.

VENV ?= .venv
# Extra arguments for pip, for instance the smaller CPU build of torch on Linux:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# Extra arguments for pytest: make test TESTS="tests/unit/test_config.py -x"
TESTS ?=

# The first Python found that is new enough; `make demo PYTHON=/path/to/python` chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo peers test test-unit test-long bench docs lint format types clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP)  ## Create the environment in .venv (the others do it when needed)

# Redone only when what is to be installed changes.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(NEW_ENOUGH)'; then \
		echo "Python 3.11 or newer is needed, and none was found (PYTHON='$(PYTHON)')." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if ! $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		echo "Creating $(VENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear "$(VENV)" || { \
			echo "Could not create $(VENV). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; fi
	@echo "Installing the tested versions of constraints.txt into $(VENV) (torch is the big one)"
	$(BIN)/python -m pip install $(PIP_FLAGS) --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)  ## Train a group on scikit-learn's digits and print its leaderboard
	$(BIN)/danling group examples/digits/group.yaml

# Most of the tests' time is waiting for processes: three at a time keep two cores busy.
test: $(STAMP)  ## Run the tests, without the long ones, in less than five minutes
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(TESTS)

test-unit: $(STAMP)  ## Run the tests that start no process, in about a minute
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/unit $(TESTS)

# Other frameworks for docs/moving.md, and a notebook's kernel: an environment of their own, which borrows torch from $(VENV).
PEERS := $(VENV)-peers
peers: $(PEERS)/.installed  ## Install other frameworks and a notebook's kernel, for the long tests

$(PEERS)/.installed: $(STAMP) constraints-peers.txt
	$(BIN)/python -m venv --clear $(PEERS)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(PEERS)/site-packages
	cp $(PEERS)/site-packages "$$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"
	$(PEERS)/bin/python -m pip install $(PIP_FLAGS) --disable-pip-version-check -c constraints-peers.txt accelerate danling ipykernel lightning
	@touch $(PEERS)/.installed

test-long: $(STAMP) peers  ## Run the long tests, two at a time: the better part of an hour
	$(BIN)/python -m pytest -m long --numprocesses 2 --dist worksteal $(TESTS)

bench: $(STAMP)  ## Measure what is claimed about speed; for a quiet machine, and a long break
	@failed=0; for each in step_overhead flow_overhead checkpoint_stall remote_overhead upload many_runs big_group; do \
		echo "python -m benchmarks.$$each"; $(BIN)/python -m benchmarks.$$each || failed=1; \
	done; exit $$failed

lint: $(STAMP)  ## Check the code's form
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Sort imports and format the code
	$(BIN)/ruff check --select I --fix . && $(BIN)/ruff format .

docs: $(STAMP)  ## Write the pages that are made from the code
	$(BIN)/python scripts/make_reference.py
	$(BIN)/python -m scripts.make_schedules
	$(BIN)/python scripts/make_coverage.py

types: $(STAMP)  ## Check the types
	$(BIN)/mypy

clean:  ## Remove the environment and every cache (runs in experiments/ stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
