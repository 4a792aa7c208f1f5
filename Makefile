# Two commands to know: make demo, make test. Each makes .venv by itself where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast bytecode lint docs install constraints clean

demo: install            ## train on digits with 80 % label noise: cross-entropy, then the full method
	rm -rf runs/digits runs/digits-supervised
	$(BIN)/python training/digits.py

# In as many processes as there are cores.
PYTEST = OMP_NUM_THREADS=1 RAY_AUTH_MODE=disabled $(BIN)/python -m pytest \
	--numprocesses logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

test: bytecode           ## all tests; no GPU, no network, no data needed
	$(PYTEST)

test-fast: bytecode      ## those that start no other process: about two minutes on two cores
	$(PYTEST) -m fast

bytecode: install        # else, where PYTHONDONTWRITEBYTECODE is set, each of some hundred processes compiles all anew
	$(BIN)/python -m compileall -q pipeline training tuning benchmarks

lint: install            ## style, types, import borders, declared packages, length and branches of functions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/lizard -l python -L 60 -C 15 -w pipeline training tuning

docs: install            ## the documentation site, into build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

constraints:             ## resolve constraints.txt anew, for the oldest Python that is supported
	$(BIN)/uv pip compile --quiet --upgrade --all-extras --python-version 3.10 --python-platform linux \
		--no-annotate --no-header --no-emit-index-url pyproject.toml -o constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
