# make demo         a small model memorizes a novel: a table, a plot and a memory folder
# make test         all tests
# make coverage     the same, and which share of the lines of locas_ext they run: takes 1.4 times as long
# make lint         style, types, layers, spelling, and whether the compiled module's stub is up to date
# make sdist-test   an sdist, a wheel from it without torch, and `locas info` from that wheel
# make bench        how fast it is on this machine
#
# Each sets up what it needs in .venv first. Python edits take effect at once; C++ edits rebuild.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
# CPU_ONLY=1 takes torch from its CPU wheel index: a download some gigabytes smaller.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test coverage lint sdist-test bench clean

demo: $(VENV)/.built
	$(BIN)/locas demo

test: $(VENV)/.built
	$(PYTEST)

coverage: $(VENV)/.built
	$(PYTEST) --cov=locas_ext

lint: $(VENV)/.lint $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell --toml pyproject.toml $(shell git ls-files)
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/python csrc/bindings/generate_stub.py --check

sdist-test: $(VENV)/.built
	$(BIN)/python .ci/sdist_test.py

bench: $(VENV)/.built
	$(BIN)/python -m bench.ffn
	$(BIN)/python -m bench.stream

$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH) $(if $(CPU_ONLY),--index-url $(TORCH_INDEX))
	$(INSTALL) $(TRANSFORMERS)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.lint: .ci/lint-requirements.txt $(VENV)/.built
	$(INSTALL) --requirement .ci/lint-requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info locas_ext/*.so
