# `make demo` and `make test` do their own set-up: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench fuzz torture faults clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadscope

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Damaged inputs and killed processes, any number of them: make fuzz N=100000 SEED=1
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/fuzz.py --cases $(or $(N),20000) --seed $(or $(SEED),0)

torture: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/torture.py --kills $(or $(N),500) --seed $(or $(SEED),0)

# Deliberate faults that the tests must notice: make faults ONLY=sampl JOBS=2; EVERY=3 takes a third of them
faults: .venv/installed
	$(BIN)/python tests/faults/run.py --only '$(ONLY)' --every $(or $(EVERY),1) --jobs $(or $(JOBS),1)

bench: .venv/installed
	$(BIN)/python benchmarks/dit.py
	$(BIN)/python benchmarks/diffussm.py
	$(BIN)/python benchmarks/nesting.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/probe.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "setting up .venv with the pinned versions: a few minutes, once"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
