# Everything starts from a bare checkout and Python >= 3.11; `make demo` and `make test` need nothing else.
PYTHON ?= python3
# The build of PyTorch. `make setup TORCH="torch==2.13.0 --index-url …"` or any other requirement chooses another.
TORCH ?= torch==2.13.0
TAPE := mlfinpy==0.1.2
BIN := .venv/bin

.PHONY: demo setup test check bench model clean

demo: .venv/tape  ## replay the real tape through the engine over ZeroMQ; numbers and picture go to build/
	$(BIN)/streamattn demo --out build

setup: .venv/ready  ## .venv with the package in development form

test: .venv/tape  ## the whole test suite
	$(BIN)/python -m pytest

check: .venv/ready  ## ruff, pyright, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/tape  ## the benchmarks that run on this machine
	$(BIN)/python benchmarks/bench_catchup.py
	$(BIN)/python benchmarks/bench_flow.py

model: .venv/tape  ## train the shipped checkpoint again
	$(BIN)/streamattn train --tape trades:emini --fraction 0.7 --mirror --out streamattn/models/emini

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25'
	$(BIN)/python -m pip install $(TORCH)
	# A CUDA build of torch brings the triton that belongs to it; only without one is triton pinned here.
	grep -v '^torch==' constraints.txt | if $(BIN)/python -m pip show --quiet triton; \
	  then grep -v '^triton=='; else cat; fi > .venv/constraints.txt
	$(BIN)/python -m pip install --constraint .venv/constraints.txt --editable '.[dev]'
	touch $@

# Only the data file of this package is used: its dependencies are old, and none of its code is imported.
.venv/tape: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps '$(TAPE)'
	$(BIN)/python -c 'from streamattn.tape import load_tape; print(len(load_tape("trades:emini")), "events, checksum verified")'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
