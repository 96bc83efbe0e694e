# `make demo` and `make test` each do everything on a fresh machine; docs/quickstart.md explains.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TE := .te
# Two files of tests at a time: most of a test waits for one process that imports.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-te test-gpu test-gpu-env lint setup lock clean

setup: $(STAMP)

$(STAMP): requirements/cpu.lock setup.py
	tools/setup_venv.sh $(VENV) requirements/cpu.lock
	touch $@

demo: setup  ## train a small model with TreePO on this machine's CPU
	$(BIN)/python examples/quickstart/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup  ## everything that fits into 25 minutes on 2 cores
	$(BIN)/python -m pytest tests -m "not long" $(SIDE_BY_SIDE)

test-long: setup  ## kills, layouts, the demo: another 45 minutes
	$(BIN)/python -m pytest tests -m long $(SIDE_BY_SIDE)

test-te: $(TE)/libte_cublas_shim.so  ## TransformerEngine's layers, built without a GPU; TE_WHEEL=..., see docs/gpu.md
	PYTHONPATH=$(TE)/site LD_PRELOAD=$(abspath $<) $(BIN)/python -m pytest tests/te

$(TE)/libte_cublas_shim.so: $(STAMP) requirements/te.lock tools/setup_te.sh tools/te_cublas_shim.c
	tools/setup_te.sh $(BIN)/python $(TE) $(TE_WHEEL)

test-gpu-env:  ## what works on a login node: the GPU environment (9 GB, five minutes) on a machine without a GPU
	tools/setup_venv.sh .gpu-env requirements/gpu.lock
	tools/test_gpu_env.sh .gpu-env

test-gpu:  ## what needs a GPU, in the environment that is active, with pytest in it (docs/gpu.md)
	python -m pytest tests/gpu

UV_COMPILE := uv pip compile --python $(BIN)/python --generate-hashes --no-emit-index-url --no-emit-find-links \
  --no-annotate --no-header
lock:  ## resolve requirements/*.in anew; needs uv
	$(UV_COMPILE) --override requirements/overrides.txt --only-binary :all: -o requirements/cpu.lock requirements/cpu.in
	$(UV_COMPILE) --override requirements/gpu-overrides.txt --only-binary :all: -o requirements/gpu.lock requirements/gpu.in
	$(UV_COMPILE) --no-deps -o requirements/gpu-source.lock requirements/gpu-source.in

clean:
	rm -rf $(VENV) .gpu-env $(TE) .cache build dist *.egg-info
