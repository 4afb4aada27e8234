# Thin: every target is a line or two. `make train` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
JOBS ?= 2
APT := DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300

.PHONY: setup tools train test test-long test-cluster gpu-check results results-rerun check format clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "setup: $(PYTHON) is missing or older than 3.11. Name a newer one: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo "setup: $(PYTHON) has no venv module. On Debian: apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# DeepSpeed ships as source and asks the installed torch how to build itself, so torch comes first.
	$(PIP) install -c requirements.lock setuptools wheel torch ninja py-cpuinfo packaging
	$(PIP) install --no-build-isolation --no-deps -r requirements.lock
	$(PIP) install --no-build-isolation --no-deps -e .
	$(PIP) check
	touch $(STAMP)

# Servers and a browser that tests run for real. Without apt those tests are skipped, and say so.
TOOLS := $(VENV)/.debian-packages
tools: $(TOOLS)

$(TOOLS): tests/debian-packages.txt | $(STAMP)
	@command -v apt-get > /dev/null || echo "tools: no apt-get here, tests that need $$(xargs < $<) will be SKIPPED" >&2
	@! command -v apt-get > /dev/null || dpkg -s $$(cat $<) > /dev/null 2>&1 || { \
	  $(APT) update -q && $(APT) install -y -q --no-install-recommends $$(cat $<); }
	touch $@

train: setup
	$(BIN)/mhc-dist train configs/tiny.yaml

test: setup tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-long: setup tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --timeout 1800

# Real launchers on hosts of our own: namespaces, sshd, Slurm, an image. Installs Debian packages as root.
test-cluster: setup
	tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/cluster -rs --durations=5

gpu-check: setup
	$(BIN)/python -m mhc_kernels.gpu_check

# RESULTS.md and its pictures, from the files in results/: seconds. results-rerun measures all of them: hours.
results: setup
	$(BIN)/mhc-dist results page

results-rerun: setup
	$(BIN)/mhc-dist results rerun
	$(BIN)/mhc-dist results page

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
