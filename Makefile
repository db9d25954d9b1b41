# Every target makes its own virtual environment the first time; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: help demo test lint slow speed bench published wheel clean

help:
	@echo "make demo   record, learn offline, compare: on the embedded MovieLens bundle (ARGS=--synthetic: on vectors)"
	@echo "make test   the test suite (under 10 minutes on two cores)"
	@echo "make lint   ruff and mypy"
	@echo "make slow   the statistical checks against the published numbers"
	@echo "make speed  the speed table, each figure with its limit"
	@echo "make bench  python -m benchmarks with ARGS: ARGS='run data_size --quick', ARGS=report, ..."
	@echo "make wheel  build the wheel into dist/"

# Torch goes first and with the pin, so that pip never looks for another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n 2 --dist worksteal $(ARGS)

speed: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed $(ARGS)

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(or $(ARGS),list)

# The published full-LLM experiment; RAW is a folder with MovieLens-10M, BUILD more options of build-assets.
published: $(STAMP)
	$(BIN)/offprompts build-assets --published --raw $(RAW) --out $(or $(BUNDLE),published-bundle) $(BUILD)
	$(BIN)/python -m benchmarks run 'movielens_published/prompts=1000/log=*' --bundle $(or $(BUNDLE),published-bundle) --prompts 1000 --out $(or $(OUT),runs/published) --workers 1 $(ARGS)
	$(BIN)/python -m benchmarks report --out $(or $(OUT),runs/published)

wheel: $(STAMP)
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
