# The two commands to know: `make demo` and `make test`. Both set up what they need, once.
#
# PYTHON=/path/to/python uses a Python that already holds torch (and, for the tests, pytest and the rest): nothing is
# downloaded, and .venv only adds pygen to what it sees there.
PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
NATIVE := $(wildcard csrc/* kernels/cpu/* kernels/cuda/* kernels/include/pygen/*) CMakeLists.txt setup.py
CXX_FILES := $(filter %.h %.cpp %.cu,$(NATIVE) $(wildcard bench/*.cu examples/cpp/* tests/emulation/* tests/emulation/bugs/* tests/fuzz/*))

.PHONY: help setup build demo test lint format bench gpu fuzz wheel clean
help:
	@echo "make demo    draw digits with every solver, and time the steps"
	@echo "make test    lint, then all tests"
	@echo "make bench   time steps and ops beside their floors and their peers"
	@echo "make gpu     on a machine with an NVIDIA GPU: every spec, the sanitizers, times; needs no network with PYTHON=..."
	@echo "make fuzz    feed damaged checkpoints to their parsers for FUZZ_SECONDS=600, with clang's libFuzzer"
	@echo "make format  put the sources into the style that make lint checks"
	@echo "make wheel   build a wheel into dist/"

$(VENV)/.dependencies: requirements.txt
ifeq ($(PYTHON),)
	python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
else
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -c "import site; print(*site.getsitepackages(), sep='\n')" > \
	  "$$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
endif
	touch $@

# The editable install builds the extension; afterwards only CMake decides what is out of date.
$(VENV)/.installed: $(VENV)/.dependencies pyproject.toml setup.py CMakeLists.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

setup: $(VENV)/.installed
build: $(VENV)/.built

demo: build
	$(PY) -m pygen demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: setup
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

test: build lint
	$(PY) -m pytest

bench: build
	$(PY) -m pygen bench

gpu: export PYGEN_CUDA_ARCHITECTURES ?= native
gpu: build
	$(PY) -m bench.gpu

FUZZ_CXX ?= clang++
FUZZ_SECONDS ?= 600
fuzz: build
	mkdir -p build/fuzz/corpus
	$(PY) -m tests.fuzz.seeds build/fuzz/seeds
	$(FUZZ_CXX) -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  tests/fuzz/checkpoint_header.cpp csrc/checkpoint_header.cpp -o build/fuzz/checkpoint_header
	cd build/fuzz && ./checkpoint_header -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -rss_limit_mb=1024 \
	  -print_final_stats=1 corpus seeds

wheel: setup
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info $(VENV) pygen/*.so
