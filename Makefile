# `make` lists the targets. PYTHON is only what .venv is made with; everything runs in .venv.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# A process for each core, four at most; a file's tests stay together, so that what they share is
# built once. A process that dies ends the run: with others in its place it would wait for ever.
# PYTEST_XDIST_AUTO_NUM_WORKERS=1 runs them one after the other.
PYTEST := $(VENV_PYTHON) -m pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0
CONFIG ?= configs/quickstart/ghm_retinanet_quickstart.yaml
ARGS ?=

# A Python named by the user must not be replaced silently by the one of an older .venv.
BOOTSTRAP = $(PYTHON) tools/bootstrap.py --detectron2 "$(DETECTRON2)" \
	$(if $(filter file,$(origin PYTHON)),,--python-was-chosen)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-reference test-slow coverage lint bench soak docs dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "Options: PYTHON=python3.12 (to make .venv with), ARGS='...' (for the command that runs),"
	@echo "DETECTRON2=git+https://github.com/facebookresearch/detectron2.git (another Detectron2)"

setup: ## create .venv and install everything, unless that is done
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: name a Python >= 3.10, for example PYTHON=python3.11." >&2; exit 1; }
	@$(BOOTSTRAP)

quickstart: setup ## set up, generate the default data, train a small GHM RetinaNet, evaluate
	@$(VENV_PYTHON) train_net.py --config-file $(CONFIG) $(if $(filter file,$(origin CONFIG)),--overwrite) $(ARGS)

test: setup ## run the tests, without the slow ones
	@$(PYTEST) $(ARGS)

test-reference: setup ## run the tests that need the reference material (GHM_D2_SHARED, or ../shared)
	@$(VENV_PYTHON) -m pytest -m reference $(ARGS)

test-slow: setup ## run the slow tests only
	@$(VENV_PYTHON) -m pytest -m slow $(ARGS)

coverage: setup ## run the tests and list the lines of losses and models that they miss
	@$(PYTEST) --cov=ghm_d2.losses --cov=ghm_d2.modeling --cov-report=term-missing --cov-fail-under=95 $(ARGS)

lint: setup ## check style, formatting and the types of ghm_d2.losses
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

bench: setup ## measure speed and memory of the losses
	@test -f benchmarks/bench_losses.py || { echo "There is no benchmarks/bench_losses.py in this version." >&2; exit 1; }
	@$(VENV_PYTHON) benchmarks/bench_losses.py $(ARGS)

soak: setup ## kill 50 short trainings at random moments and resume them (about 25 minutes)
	@$(VENV_PYTHON) benchmarks/soak.py $(ARGS)

docs: ## build the documentation into docs/_build/html, every warning an error
	@$(BOOTSTRAP) --target docs
	@$(VENV_PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Documentation: docs/_build/html/index.html"

# The wheel is built from the source distribution, which shows that nothing is missing there.
dist: ## build wheel and source distribution into dist/, and check them
	@$(BOOTSTRAP) --target dist
	@rm -rf dist build
	@$(VENV_PYTHON) -m build --no-isolation
	@$(VENV_PYTHON) -m twine check --strict dist/*

clean: ## delete .venv and caches; data sets and trained models stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis docs/_build
	find . -name __pycache__ -type d -not -path './datasets/*' -not -path './output/*' -prune -exec rm -rf {} +
