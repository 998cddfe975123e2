# Every target sets up what it needs, in .venv. All that must be there: make, a C++ compiler, and Python 3.10 or
# newer with its venv module and C headers.
#
#   make demo         run the example on a photograph
#   make digits       train on handwritten digits
#   make cpp          run an exported model in C++    (make library: libmyconv.so alone)
#   make test         build, and run the tests          (make test ARGS="-k stride"; -n 0: in one process)
#   make test-slow    the long tests
#   make bench        a short benchmark against torch
#   make lint         check style                       make format   repair it
#   make types        check type hints
#   make wheel        a wheel for the torch in use, in dist/
#   make clean        remove what was built (rm -rf .venv removes the rest)
#
#   TORCH=2.12.0                another torch: reinstalls and rebuilds
#   PYTHON=python3.12           the Python that makes .venv (used once)
#   CXX=clang++                 another compiler: rebuilds
#   MYCONV_ISA_BUILD=portable   no x86 SIMD kernels: rebuilds
#   MYCONV_CUDA=0               no CUDA kernels: rebuilds

PYTHON ?= python3
TORCH ?= 2.13.0
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
INSTALL := $(PIP) install -c requirements.txt
# Threads of one process that wait must not keep another's from running.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 4
STAMPS := $(VENV)/.stamps

# What the build depends on, besides the sources, is in the stamp's name.
space := $(subst ,, )
compiler := $(if $(filter environment command,$(origin CXX)),$(subst $(space),-,$(notdir $(CXX))),c++)
TORCH_STAMP := $(STAMPS)/torch-$(TORCH)
BUILD_STAMP := $(STAMPS)/build-torch-$(TORCH)-$(or $(MYCONV_ISA_BUILD),all)-$(or $(MYCONV_CUDA),auto)-$(compiler)
BUILD := $(BUILD_STAMP) $(STAMPS)/editable
SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.*)
EXTENSION := $(wildcard myconv/_C.*.so)
CXX_FILES := $(wildcard $(addprefix csrc/,*.h *.cpp */*.h */*.cpp */*.inc */*.cu */*.cuh) examples/cpp/*.cpp)
CXX_FILES += $(wildcard tests/emulator/* benchmarks/*.cpp)
CMAKE := $(or $(shell command -v cmake 2>/dev/null),$(VENV)/bin/cmake)

.DEFAULT_GOAL := test
.PHONY: demo digits library cpp test test-slow bench lint types format wheel clean build FORCE
.DELETE_ON_ERROR:
FORCE:

demo: $(BUILD) $(STAMPS)/examples
	$(PY) examples/detect_faces.py $(ARGS)

digits: $(BUILD) $(STAMPS)/examples
	$(PY) examples/train_digits.py $(ARGS)

library: $(TORCH_STAMP) $(STAMPS)/cmake
	$(CMAKE) -S . -B build/cmake -Wno-dev
	$(CMAKE) --build build/cmake -j $(shell nproc)

cpp: library $(BUILD)
	$(PY) examples/cpp/export_model.py build/cpp
	$(CMAKE) -S examples/cpp -B build/cpp -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	$(CMAKE) --build build/cpp
	build/cpp/run_model build/cpp

test: $(BUILD) $(STAMPS)/test
	$(PYTEST) $(ARGS)

test-slow: $(BUILD) $(STAMPS)/test
	$(PYTEST) -m slow $(ARGS)

bench: $(BUILD) $(STAMPS)/bench
	$(PY) benchmarks/run.py --quick $(ARGS)

lint: $(STAMPS)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

# stubtest holds _C.pyi to the module that was built.
types: $(BUILD) $(STAMPS)/types
	$(VENV)/bin/mypy
	$(VENV)/bin/stubtest myconv._C --mypy-config-file pyproject.toml

format: $(STAMPS)/lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# build/lib.* is setuptools' staging folder: what it holds of earlier builds would end up in the wheel.
wheel: $(TORCH_STAMP) $(STAMPS)/tools
	rm -rf build/lib.* build/bdist.*
	$(PIP) wheel --no-build-isolation --no-deps -w dist .
	@ls dist

build: $(BUILD)

clean:
	rm -rf build dist myconv.egg-info myconv/_C.*.so myconv/_build.py $(STAMPS)/build-*
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# --- what the targets stand on -------------------------------------------------------------------------------------

$(PY):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "make: $(PYTHON) must be Python 3.10 or newer; name another one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" || \
	    { echo "make: $(PYTHON) lacks the venv module. On Debian or Ubuntu: apt install python3-venv python3-dev"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/venv: | $(PY)
	@mkdir -p $(@D)
	@touch $@

# Plain, and first: a package that depends on torch could otherwise bring a different one.
$(TORCH_STAMP): $(STAMPS)/venv
	$(PIP) install torch==$(TORCH)
	@rm -f $(STAMPS)/torch-* $(STAMPS)/build-*
	@touch $@

$(STAMPS)/tools: $(STAMPS)/venv requirements.txt | $(TORCH_STAMP)
	$(INSTALL) setuptools ninja numpy
	@touch $@

$(STAMPS)/test: $(STAMPS)/venv requirements.txt | $(TORCH_STAMP)
	$(INSTALL) pytest pytest-xdist hypothesis expecttest numpy nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	@touch $@

# facenet-pytorch holds weights that the example reads; its own requirements are for a torch of years ago.
$(STAMPS)/examples: $(STAMPS)/venv requirements.txt Makefile | $(TORCH_STAMP)
	$(INSTALL) numpy pillow matplotlib rich scikit-image scikit-learn
	$(INSTALL) --no-deps facenet-pytorch
	@touch $@

# Only where there is no cmake.
$(STAMPS)/cmake: $(STAMPS)/venv requirements.txt
	$(if $(filter $(VENV)/%,$(CMAKE)),$(INSTALL) cmake)
	@touch $@

$(STAMPS)/bench: $(STAMPS)/venv requirements.txt | $(TORCH_STAMP)
	$(INSTALL) numpy matplotlib rich
	@touch $@

$(STAMPS)/lint: $(STAMPS)/venv requirements.txt
	$(INSTALL) ruff clang-format
	@touch $@

$(STAMPS)/types: $(STAMPS)/venv requirements.txt
	$(INSTALL) mypy
	@touch $@

# A missing extension, or a build record newer than the stamp (a build by hand), also asks for a build.
$(BUILD_STAMP): $(SOURCES) $(TORCH_STAMP) $(STAMPS)/tools $(wildcard myconv/_build.py) $(if $(EXTENSION),,FORCE)
	$(PY) setup.py --quiet build_ext --inplace
	@rm -f $(STAMPS)/build-*
	@touch $@

# Once: makes `import myconv` work from any folder. It reuses the objects of the build.
$(STAMPS)/editable: $(STAMPS)/venv pyproject.toml myconv/_version.py | $(BUILD_STAMP)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
