# make demo   sets up .venv, runs the demo with the bundled weights, prints where its report is
# make test   the linter, the types and the whole suite; make fast leaves the slow tests out
# make test-newest, make test-oldest
#             the same as make fast, at either end of pyproject.toml's ranges: run both whenever a dependency changes
# make chaos  kills trainings 50 times and soaks training and server for an hour; the figures go to docs/reliability.md
# make bench  the benchmarks that a CPU can run, as they were recorded; then the tables of docs/performance.md
# make docs   the guides and the API reference as a site, in site/; a warning is an error
# make clean  removes what these made, the environments too; runs/ stays

PYTHON ?= python3
# An index of torch wheels, where the registry's own build is not wanted: on Linux that one brings CUDA, and PyTorch's
# own index of CPU wheels (its address is on pytorch.org) is much smaller: make demo TORCH_INDEX=...
TORCH_INDEX ?=
# One process a core: the tensors of the tests are too small for more than one thread each.
# In the order of their names: the kill test, two tests that take five minutes, begins first and not alone at the end.
WORKERS ?= 2

BIN := .venv/bin
# The arguments of pip and pytest come after these two; $(1) is the environment.
install = $(1)/bin/python -m pip install --disable-pip-version-check --quiet
pytest = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test fast chaos bench test-newest test-oldest lint docs clean
.DEFAULT_GOAL := demo

demo: .venv/installed
	$(BIN)/spar demo -o demo --overwrite
	@echo "The report is demo/report.html: open it in a browser."

test: lint
	$(call pytest,.venv)

fast: lint
	$(call pytest,.venv) -m "not slow"

# Every run upgrades the environment; only torch stays at its pin. Where pip finds no versions that agree, PIP_VERBOSE=1
# makes it print the requirements.
test-newest: .venv-newest/installed
	$(call install,.venv-newest) --constraint .venv-newest/constraints.txt --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-newest/bin/ruff check .
	$(call pytest,.venv-newest) -m "not slow"

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/ruff check .
	$(call pytest,.venv-oldest) -m "not slow"

chaos: .venv/installed
	$(BIN)/python tests/chaos/kills.py --kills 50 > docs/reliability/kills.json
	$(BIN)/python tests/chaos/soak.py --minutes 60 > docs/reliability/soak.json
	$(BIN)/python docs/reliability.py

bench: .venv/installed
	$(BIN)/python benchmarks/all.py
	$(BIN)/python docs/performance.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/mkdocs build
	@echo "The documentation is site/index.html: open it in a browser."

# An environment with torch in it: torch first and alone, as pip then takes a local CPU build of the pinned version where
# there is one, before another package's requirement of torch installs the CUDA build.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "spar needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	{ echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(@D) (a few minutes, once)"
	$(PYTHON) -m venv $(1) $(@D)
	$(call install,$(@D)) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
endef

.venv/installed: pyproject.toml constraints.txt
	$(call environment)
	$(call install,$(@D)) --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

.venv-newest/installed: pyproject.toml constraints.txt
	$(call environment,--clear)
	@grep '^torch==' constraints.txt > $(@D)/constraints.txt
	@touch $@

.venv-oldest/installed: pyproject.toml constraints.txt .ci/oldest.py
	$(call environment,--clear)
	@{ grep '^torch==' constraints.txt && $(PYTHON) .ci/oldest.py; } > $(@D)/constraints.txt
	$(call install,$(@D)) --constraint $(@D)/constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-newest .venv-oldest demo site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
