# make demo | test | bench | lint | format | clean.  Needs Python >= 3.10, a C++17 compiler and make; the rest comes from pip.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp')

.PHONY: demo test bench lint format clean

demo: $(READY)
	$(BIN)/lplb demo

test: $(READY)
	$(BIN)/python -m pytest tests

bench: $(READY)  # --write keeps the figures; then benchmarks/readme_table.py puts them into the README
	$(BIN)/python benchmarks/bench_cpu.py

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

$(READY): $(VENV)/torch pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --editable ".[demo,test,lint]"
	touch $@
