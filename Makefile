# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. Each makes .venv from nothing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Test workers: one per core, and one thread in each, so that they do not fight over the cores.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)))")

.PHONY: demo examples test check bench bench-check gpu sanitize render report clean

# The stamps are newer than what they were made from, so a second `make` starts at once. torch comes first and by itself:
# a later resolver run must not replace the build that was chosen. FASTBP_BUILD=auto, the default, builds what it can.
$(VENV)/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "numpy==2.3.5" "setuptools==81.0.0"
	FASTBP_BUILD=none $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.stamp setup.py fastbp/version.py $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/python -c "import fastbp; print('native kernels:', fastbp.available_backends()['native'])"
	touch $@

demo: $(VENV)/.built
	$(BIN)/python -m fastbp demo $(ARGS)

# Each trains stock and fused and says whether they agree; ARGS=--quick for fewer steps. One that lacks a package says so
# and ends with 2, and the others go on.
examples: $(VENV)/.built
	for example in $(filter-out examples/common.py,$(wildcard examples/*.py)); do \
	  printf '\n== %s\n' $$example; $(BIN)/python $$example $(ARGS) || [ $$? = 2 ] || exit 1; done

test: $(VENV)/.built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(VENV)/.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.* tests/*.cpp tests/emulated/*.cpp tests/emulated/*.h
	$(BIN)/python tools/render.py --check
	$(BIN)/python tools/fit_polynomials.py --check > /dev/null
	$(BIN)/python tools/fit_sides.py --check > /dev/null
	$(BIN)/python -m benchmarks.static --quick

# ARGS="--suite layers" and the like; --help has them all.
bench: $(VENV)/.built
	$(BIN)/python -m benchmarks.run $(ARGS)

# Did something become slower than in a committed version? Both in one run; ARGS="--base main" and the like.
bench-check: $(VENV)/.built
	$(BIN)/python -m benchmarks.check $(ARGS)

# All there is to do on a machine with a GPU, stage by stage; ARGS="--stage tests" for one, --dry-run without a GPU.
# With PY=python3 it runs in an environment that is already there, and asks for no network.
PY ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(PY)),$(VENV)/.built)
	$(PY) -m benchmarks.gpu $(ARGS)

# The C++ kernels under AddressSanitizer and UBSan, in a build of their own.
SANITIZED := build/sanitized
sanitize: $(VENV)/.stamp
	FASTBP_BUILD=cpu FASTBP_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g" \
	  $(BIN)/python setup.py -q build_ext --build-temp $(SANITIZED) --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  FASTBP_NATIVE_LIBRARY=$(SANITIZED)/fastbp/_native.abi3.so \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/test_native.py tests/test_native_overwrite.py -k "not every_capability" $(ARGS)

# Rewrite the files that are made from the tables and the results: activations in Triton and C++, tables and pictures in
# README.md and docs/.
render: $(VENV)/.stamp
	$(BIN)/python tools/render.py

# After a measurement: what README.md and docs/ show of the results, and build/report.html with every row.
report: render
	$(BIN)/python -m benchmarks.report $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .ruff_cache .mypy_cache
