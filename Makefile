# make demo   set up, then train the default recipe (options: make demo ARGS="--model.temporal none")
# make test   set up, then run the tests            (options: make test ARGS="-m 'not slow'")
# make setup  virtual environment, pinned dependencies, compiled extension; only what is out of date
# make lint   formatting, static checks, types
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

python := $(VENV)/bin/python
installed := $(VENV)/.installed
built := $(VENV)/.built
sources := setup.py pyproject.toml accel/__init__.py $(shell find kernels/csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

# An extension that was built and has been deleted since is built again.
$(shell grep -qs . $(built) && [ ! -e kernels/_C.so ] && rm -f $(built))

.PHONY: demo test setup lint clean cuda-torch test-dali-1.34 test-dali-1.53

demo: setup
	$(python) train.py $(ARGS)

test: setup
	$(python) -m pytest $(ARGS)

setup: $(built)

lint: setup
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy

# A stamp is touched only after its step has succeeded: an interrupted set-up is repeated.
$(installed): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is older than Python 3.10; run make PYTHON=python3.11 (or newer)." >&2; exit 2; }
	@echo "Installing pinned dependencies into $(VENV); the first time this takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# No build isolation: the extension must be built against the torch that will load it.
$(built): $(installed) $(sources)
	$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@ls kernels/_C.so > $@ 2>/dev/null || : > $@

clean:
	rm -rf build kernels/*.so *.egg-info $(VENV)

# A CUDA build of torch, headers and libraries only: the tests then link the whole extension against
# it (never imported; 530 MB are downloaded once).
cuda_torch := build/cuda-torch

cuda-torch: $(cuda_torch)/.unpacked

$(cuda_torch)/.unpacked: | $(installed)
	@echo "Downloading a CUDA build of torch into $(cuda_torch)."
	rm -rf $(cuda_torch)
	$(python) -m pip download --quiet --disable-pip-version-check --no-deps --no-cache-dir \
	  --dest $(cuda_torch) torch==2.12.1
	$(python) -m zipfile -e $(cuda_torch)/*.whl $(cuda_torch)
	rm $(cuda_torch)/*.whl
	@touch $@

# The loader tests with an older DALI in front of the installed one: the last for CUDA 11 that PyPI
# serves (Python 3.12 or older), and the last 1.x (CUDA 12, Python 3.13 or older; 400 MB).
dali_wheels = $(or $(dali_wheels_$*),$(error no rule for DALI $*))
dali_wheels_1.34 := nvidia-dali-cuda110==1.34.0
dali_wheels_1.53 := nvidia-dali-cuda120==1.53.0 nvidia-nvimgcodec-cu12==0.7.0.11

test-dali-1.34 test-dali-1.53: test-dali-%: build/dali-%/.installed | setup
	PYTHONPATH=$(CURDIR)/build/dali-$* $(python) -m pytest -m "not slow" tests/pipelines/test_loader.py \
	  tests/pipelines/test_frame_folders.py tests/pipelines/test_views.py

build/dali-%/.installed: | $(installed)
	rm -rf $(@D)
	$(python) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) \
	  $(dali_wheels) dm-tree==0.1.10 absl-py==2.5.1 attrs==26.1.0 wrapt==2.5.2
	@touch $@
