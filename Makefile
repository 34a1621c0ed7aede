# `make demo` and `make test` do all the set-up they need; `make install` is the set-up alone.

PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
VENV := .venv
# Other people's models, and another torch than the one that builds.
INTEROP := .venv-interop
INTEROP_TORCH ?= torch==2.14.1 torchvision==0.29.1

# A Python that has torch already is used as it is, and nothing of it is pinned or upgraded.
HAS_TORCH := $(shell $(PYTHON) -c 'import torch; print((*map(int, torch.__version__.split(".")[:2]),) >= (2, 11))' 2>/dev/null)
ifeq ($(HAS_TORCH),True)
RUN := $(PYTHON)
STAMP := build/installed
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
endif

# A process a core, where the plugin is that shares the tests out among them.
PARALLEL = $(shell $(RUN) -c 'import xdist' 2>/dev/null && echo '-n auto --dist worksteal')

NATIVE := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-interop gpu mutants sanitize sanitize-threads install lint clean

demo: install
	$(RUN) -m pathnet demo

test: install
	$(RUN) -m pytest $(PARALLEL)

# Networks of torchvision, timm and transformers, through the library that `make install` built, in another torch.
TRACED := $(wildcard tests/models/test_adapt*.py) tests/models/test_exported.py tests/models/test_tokens.py tests/test_readme.py
test-interop: install $(INTEROP)/installed
	$(INTEROP)/bin/python -m pytest -n auto --dist worksteal tests/interop $(TRACED)

# On a machine with a GPU: tests, memory checks and benchmarks, into benchmarks/results. COMMIT=... where git is not.
gpu: install
	$(RUN) -m benchmarks.gpu $(STEPS) $(if $(COMMIT),--commit $(COMMIT))

# Every expression of the kernels' index arithmetic changed in turn: an hour and more.
mutants: install
	$(RUN) tests/csrc/mutations/run.py

# The cpu kernels alone, on random networks, watched by the compiler's sanitizers: a minute or two on two cores, most
# of it compiling.
CMAKE := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake
sanitize: SANITIZERS := address,undefined
sanitize-threads: SANITIZERS := thread
sanitize sanitize-threads:
	$(CMAKE) -S . -B build/$@ -DPATHNET_SANITIZE=$(SANITIZERS)
	$(CMAKE) --build build/$@ --parallel $(shell nproc)
	build/$@/walks $(TRIALS)

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c 'from clang_format import clang_format; clang_format()' --dry-run -Werror $(shell find csrc tests/csrc/sanitizers -type f)

install: $(STAMP)

# A stamp, since an interrupted set-up leaves a Python without torch, and pip would then fetch any torch.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH) "setuptools>=77" cmake ninja pybind11
	@touch $@

# Where no network is, what a GPU run needs may be there without all that experiments and figures need.
build/installed: $(NATIVE)
	$(RUN) -m pip install --quiet --retries 1 --no-build-isolation -e '.[paper]' || \
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/installed: $(NATIVE) | $(VENV)/torch
	$(RUN) -m pip install --quiet --no-build-isolation -e '.[dev,paper]'
	@touch $@

# What pyproject.toml names, without a build of the package itself.
$(INTEROP)/installed: pyproject.toml
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	extra = project['optional-dependencies']; \
	print(*project['dependencies'], *extra['paper'], *extra['vision'], *extra['language'], *extra['tensorboard'], sep='\n')" \
	> $(INTEROP)/requirements.txt
	$(INTEROP)/bin/python -m pip install --quiet $(INTEROP_TORCH) pytest pytest-xdist -r $(INTEROP)/requirements.txt
	$(INTEROP)/bin/python -c "import tensorboard, timm, torchvision, transformers"
	@touch $@

clean:
	rm -rf build $(VENV) $(INTEROP) pathnet/*.so *.egg-info
