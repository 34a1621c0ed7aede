# `make demo` and `make test` set up everything they need; `make install` only sets up.

PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
VENV := .venv
# An environment for models of other libraries, with another torch than the one that builds.
INTEROP := .venv-interop
INTEROP_TORCH ?= torch==2.14.1 torchvision==0.29.1

# A Python that already has torch is used as it is; nothing in it is pinned or upgraded.
HAS_TORCH := $(shell $(PYTHON) -c 'import torch; print((*map(int, torch.__version__.split(".")[:2]),) >= (2, 11))' 2>/dev/null)
ifeq ($(HAS_TORCH),True)
RUN := $(PYTHON)
STAMP := build/installed
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
endif

# One test process per core, if the plugin that distributes tests is installed.
PARALLEL = $(shell $(RUN) -c 'import xdist' 2>/dev/null && echo '-n auto --dist worksteal')

DOCS = $(if $(filter $(VENV)/%,$(RUN)),$(VENV)/docs)

NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-interop docs notebooks gpu wheel wheel-test mutants sanitize sanitize-threads install tools lint clean

demo: install
	$(RUN) -m pathnet demo

test: install
	$(RUN) -m pytest $(PARALLEL)

# Test networks of torchvision, timm and transformers in another torch, with the library that `make install` built.
TRACED := $(wildcard tests/models/test_adapt*.py) tests/models/test_exported.py tests/models/test_tokens.py tests/docs/test_pages.py
test-interop: install $(INTEROP)/installed
	$(INTEROP)/bin/python -m pytest -n auto --dist worksteal tests/interop $(TRACED)

# Build the documentation into build/docs, offline, and check its links and the completeness of its references; a warning
# is an error.
docs: install $(DOCS)
	rm -rf build/docs/_modules  # Sphinx does not renew their links back to the reference
	$(RUN) -m sphinx -W --keep-going -q -j auto -d build/doctrees docs build/docs
	$(RUN) docs/check.py build/docs
	@echo "the documentation is build/docs/index.html"

# Run the documentation's notebooks, and store their outputs: a minute.
notebooks: install
	PYTHONPATH=tests $(RUN) -m helpers.notebooks

# Build dist/: an sdist, and from it the wheel of this Python.
wheel: install
	rm -rf dist
	$(RUN) -m build --no-isolation > build/wheel.log || (cat build/wheel.log; exit 1)
	@ls dist/*

# Install the wheel in fresh environments that have neither a compiler nor this folder, and use it there. With
# TORCH=torch==... they get another torch than the one that built it.
wheel-test: wheel
	PATHNET_WHEEL=$$(ls $(CURDIR)/dist/*.whl) PATHNET_WHEEL_TORCH=$(firstword $(TORCH)) $(RUN) -m pytest tests/wheel

# On a machine with a GPU: tests, memory checks and benchmarks, into benchmarks/results. COMMIT=... if there is no git.
gpu: install
	$(RUN) -m benchmarks.gpu $(STEPS) $(if $(COMMIT),--commit $(COMMIT))

# Change each expression of the kernels' index arithmetic in turn, and see the tests fail: an hour or more.
mutants: install
	$(RUN) tests/csrc/mutations/run.py

# Run the cpu kernels alone, on random networks and blocks, under the compiler's sanitizers: two or three minutes on two
# cores, most of it for compiling.
CMAKE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake
sanitize: SANITIZERS := address,undefined
sanitize-threads: SANITIZERS := thread
sanitize sanitize-threads:
	$(CMAKE) -S . -B build/$@ -DPATHNET_SANITIZE=$(SANITIZERS)
	$(CMAKE) --build build/$@ --parallel $(shell nproc)
	build/$@/walks $(TRIALS)

lint: install $(DOCS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c 'from clang_format import clang_format; clang_format()' --dry-run -Werror $(shell find csrc tests/csrc/sanitizers -type f)

install: $(STAMP)

# What a build needs of the system, looked for before anything is downloaded: pip buries it under a page of messages.
HEADERS := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
tools:
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "install Python's venv module (on Debian: python3-venv)" >&2; exit 1; }
	@test -f $(HEADERS)/Python.h || { echo "install the headers of Python (on Debian: python3-dev)" >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || { echo "install a C++ compiler (on Debian: g++)" >&2; exit 1; }

# A stamp of its own: after an interrupted set-up the environment has no torch, and pip would fetch any version of it.
$(VENV)/torch: | tools
	@echo "setting up $(VENV): torch, other packages and a native build, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH) "setuptools>=77" cmake ninja pybind11
	@touch $@

# Without a network, fall back to the package alone: GPU runs do not need what experiments and figures need.
build/installed: $(NATIVE)
	$(RUN) -m pip install --quiet --retries 1 --no-build-isolation -e '.[paper]' || \
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/installed: $(NATIVE) | $(VENV)/torch
	$(RUN) -m pip install --quiet --no-build-isolation -e '.[dev,paper]'
	@touch $@

$(VENV)/docs: pyproject.toml | $(VENV)/installed
	$(RUN) -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*project['optional-dependencies']['docs'], sep='\n')" > $(VENV)/docs.txt
	$(RUN) -m pip install --quiet -r $(VENV)/docs.txt
	@touch $@

# Install the dependencies that pyproject.toml names, without building the package itself.
$(INTEROP)/installed: pyproject.toml
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	extra = project['optional-dependencies']; \
	print(*project['dependencies'], *extra['paper'], *extra['vision'], *extra['language'], *extra['tensorboard'], sep='\n')" \
	> $(INTEROP)/requirements.txt
	$(INTEROP)/bin/python -m pip install --quiet $(INTEROP_TORCH) pytest pytest-xdist datasets wandb -r $(INTEROP)/requirements.txt
	$(INTEROP)/bin/python -c "import datasets, tensorboard, timm, torchvision, transformers, wandb"
	@touch $@

clean:
	rm -rf build dist $(VENV) $(INTEROP) pathnet/*.so *.egg-info
