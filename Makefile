# make demo   sets up .venv, runs the demo with the bundled weights, says where its report is
# make test   the linter and the whole suite; make fast leaves the slow tests out
# make clean  removes what these made, .venv too; runs/ stays

PYTHON ?= python3
# An index of torch wheels, where the registry's own build is not wanted: on Linux that one brings CUDA, and PyTorch's
# own index of CPU wheels (its address is on pytorch.org) is much smaller: make demo TORCH_INDEX=...
TORCH_INDEX ?=
# One process a core: the tensors of the tests are too small for more than one thread each.
WORKERS ?= 2

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test fast lint clean
.DEFAULT_GOAL := demo

demo: .venv/installed
	$(BIN)/spar demo -o demo --overwrite
	@echo "The report is demo/report.html: open it in a browser."

test: lint
	$(PYTEST)

fast: lint
	$(PYTEST) -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check .

# torch first and alone: pip then takes a local CPU build of the pinned version where there is one, and no other package's
# wish for torch can bring the CUDA build in before it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "spar needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	{ echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
