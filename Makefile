# Everything a clone needs: `make demo`, `make test`, `make check`, `make bench`, `make clean`.
# Needs Python 3.11 or newer, make and bash. The virtual environment is built on first use.

SHELL := bash

# Another Python: make PYTHON=/path/to/python3. Otherwise the first that is new enough.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))

# Test processes at once, a few more than small machines have cores, for many tests wait; further options of pytest
# or of the benchmarks: make test JOBS=2 ARGS='-k placement', make bench ARGS='--quick keys tasks'
JOBS ?= 3
ARGS ?=

BIN   := .venv/bin
READY := .venv/.installed
BENCH := .venv/.bench-installed
CODE  := s4 migrations tests examples benchmarks

.PHONY: help check test demo bench clean

help:
	@echo 'make demo         three nodes on this machine answer questions about 336,776 flights'
	@echo 'make demo KEEP=1  the same, and the cluster stays up'
	@echo 'make test         the tests'
	@echo 'make check        lint, format and types'
	@echo 'make bench        how s4 grows, 10 minutes; ARGS=--quick: 3 minutes'
	@echo 'make clean        remove everything that make has made'

demo: $(READY)
	@PATH="$$PWD/$(BIN):$$PATH" KEEP="$(KEEP)" bash examples/flights/demo.sh

test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

check: $(READY)
	$(BIN)/python -m ruff check $(CODE)
	$(BIN)/python -m ruff format --check $(CODE)
	$(BIN)/python -m mypy --strict $(CODE)

bench: $(BENCH)
	@$(BIN)/python -m benchmarks.run $(ARGS)

# What draws the picture is large, and nothing else needs it.
$(BENCH): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

# Installed once, and again when the dependencies change; the code itself is used in place.
$(READY): pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo 'fatal: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo 'fatal: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'making .venv (once)'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@# Start-up is most of a short command. A script of an older pip imports `re` for nothing, setuptools (which
	@# only venvs of 3.11 have) runs a hook, and compiled code should be there from the first run on.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip uninstall --quiet --quiet --yes setuptools
	@$(BIN)/python -m pip install --quiet -e '.[dev]'
	@# Relative, for Python below 3.13 reads it as ASCII under LC_ALL=C, which commands of jobs have.
	@echo ../../../.. | tee .venv/lib/python3*/site-packages/*_s4.pth >/dev/null
	@$(BIN)/python -m compileall -q s4 migrations
	@touch $@

clean:
	rm -rf .venv .cache dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
