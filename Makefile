# make demo | test | bench | gpu | lint | format | clean.  Needs Python >= 3.10, a C++17 compiler and make; the rest comes from pip.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
# With nvcc of CUDA 13 the extension has cuSolverDx as well: the wheels of pyproject's extra mathdx, NVRTC as nvcc.
NVCC    := $(if $(CUDA_HOME),$(CUDA_HOME)/bin/)nvcc
CUDA_13 := $(shell $(NVCC) --version 2>/dev/null | sed -n 's/.*release \(13\.[0-9]*\),.*/\1/p')
MATHDX  := $(if $(CUDA_13),$(if $(filter 0,$(LPLB_CUDA) $(LPLB_MATHDX)),,$(VENV)/mathdx))
CXX_FILES := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench gpu lint format clean

demo: $(READY)
	$(BIN)/lplb demo

WORKERS ?= 2
test: $(READY)  # a file's tests stay in one process
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile

bench: $(READY)  # --write keeps the figures; then benchmarks/readme_table.py puts them into the README
	$(BIN)/python benchmarks/bench_cpu.py
	$(BIN)/python benchmarks/bench_ep.py
	-$(BIN)/pip install -q --disable-pip-version-check --no-deps sglang==0.5.23  # for its two files of EPLB
	$(BIN)/python benchmarks/bench_placement.py
	$(BIN)/python benchmarks/bench_dynamic.py
	$(BIN)/python benchmarks/bench_llep.py

gpu:  # on a machine with a GPU; settings and use without network are described in the script
	PYTHON="$(PYTHON)" benchmarks/gpu.sh

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest --allowlist tests/stubtest.allow lplb._C
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build lplb.egg-info lplb/_C*.so

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "setuptools>=77.0.3" "cmake>=3.24" ninja pybind11 "$(TORCH)"
	touch $@

$(VENV)/mathdx: $(VENV)/torch
	$(BIN)/pip install -q --disable-pip-version-check nvidia-libmathdx-cu13==0.4.1.15 "nvidia-cuda-nvrtc==$(CUDA_13).*"
	touch $@

$(READY): $(VENV)/torch $(MATHDX) pyproject.toml setup.py CMakeLists.txt $(shell find cmake csrc -type f)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --editable ".[demo,test,lint]"
	touch $@
