# The two commands: `make demo` (train with the sequence cut over 4 ranks) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# On a machine whose own Python has torch with a GPU, that one; nothing needs to be installed there.
GPU_PYTHON = $(shell $(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)

# torch alone is not in the lock, as its builds differ from machine to machine: the version that the tests passed with.
TORCH := 2.13.0
EXTRAS := planner train mpi test lint plot kernels hf
TOOLS := .venv-tools
NEWEST := .venv-newest
comma := ,
space := $() $()

.PHONY: demo test test-nightly test-programs test-newest lint lock gpu bench bench-planning bench-swapping bench-placement bench-kernels bench-layers bench-learning install clean

install: $(STAMP)

$(STAMP): pyproject.toml requirements.lock .ci/make_venv.py Makefile
	$(PYTHON) .ci/make_venv.py $(VENV) $(TORCH)
	touch $@

# Everything that `make install` installs but torch and its CUDA libraries, with hashes, at the newest versions that work
# together on every Python and platform: commit what comes out when the tests pass with it.
lock:
	test -x $(TOOLS)/bin/uv || { $(PYTHON) -m venv $(TOOLS) && $(TOOLS)/bin/pip install --quiet uv; }
	printf '%s\n' pip setuptools 'torch==$(TORCH)' | $(TOOLS)/bin/uv pip compile --quiet --upgrade --universal \
		--python-version 3.11 --fork-strategy fewest --no-build --generate-hashes --no-header --no-annotate \
		$(EXTRAS:%=--extra %) pyproject.toml - --output-file $(TOOLS)/all.txt > /dev/null
	{ echo '# Made by `make lock`; what `make install` installs beside torch $(TORCH).'; \
		awk '/^[^ ]/ {left_out = /^(torch|nvidia-|cuda-)/} !left_out' $(TOOLS)/all.txt; } > requirements.lock

# The newest version of every dependency but torch, and the tests that show its face (marked `newest`): the next release
# that breaks something is seen here first.
test-newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		torch==$(TORCH) -e '.[$(subst $(space),$(comma),$(filter-out lint,$(EXTRAS)))]'
	$(NEWEST)/bin/pip freeze --exclude-editable
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest --nightly -m newest

# One test body runs in four worlds: ranks are threads, processes, what torchrun starts, and what mpiexec starts. Of what
# takes long here is a sample, also of what processes do alike however they were started.
test: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 -m pytest --world torchrun --sampled 3
	OMP_NUM_THREADS=1 $(BIN)/mpiexec -n 4 $(BIN)/python -m pytest --world mpirun --only-mpi --sampled 8
	$(BIN)/python -m pytest --world processes --sampled 8
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow --numprocesses 2

# The rest: all cases of what `make test` takes a sample of, thousands of random programs.
test-nightly: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 -m pytest --world torchrun --sampled 3 --nightly -m nightly
	OMP_NUM_THREADS=1 $(BIN)/mpiexec -n 4 $(BIN)/python -m pytest --world mpirun --only-mpi --sampled 8 --nightly -m nightly
	$(BIN)/python -m pytest --world processes --sampled 8 --nightly -m nightly
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow --nightly -m nightly --numprocesses 2

# What guards main of it: two thousand random programs, whose gradients are those of one device.
test-programs: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow --nightly -m nightly --numprocesses 2 \
		tests/training/test_gradient_programs.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Kernels and streams on a GPU: the tests, and only if all pass the measurements. Exit status 2: there is no CUDA device.
gpu:
	@$(GPU_PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || \
		{ echo "make gpu: there is no CUDA device that $(GPU_PYTHON) can use"; exit 2; }
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu || { echo "make gpu: refused on a red gate"; exit 1; }
	$(GPU_PYTHON) -m bench.ops.gpu --out bench/results/gpu.json --readme bench/README.md

# Registers, spills and matrix instructions of every kernel, compiled for GPUs that need not be here.
bench-kernels: install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.ops.kernels --out bench/results/kernels.json --readme bench/README.md

# Step time for 1, 2 and 4 ranks, per scan and transport, in one run; the README's numbers come from here. The allocator
# keeps its memory: otherwise the kernel clears fresh pages in every step, most of them for the one-rank step.
bench: install
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000 OMP_NUM_THREADS=1 \
		$(BIN)/torchrun --standalone --nproc-per-node 4 -m bench \
		--out bench/results/scaling.json --plot bench/results/scaling.svg

# Speed, memory and the cost of a cut of every layer; about ten minutes. The allocator keeps its memory, as in `bench`,
# and has one arena: those of threads are too small for the tensors of one rank, but not for those of four.
bench-layers: install
	MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000 OMP_NUM_THREADS=1 \
		$(BIN)/python -m bench.models.layers --out bench/results/layers.json --plot bench/results/layers.svg

# What every layer learns on two ranks and on one, and which ones recall; about an hour.
bench-learning: install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.models.learning \
		--out bench/results/learning.json --plot bench/results/learning.svg

# How good plans are and how close to the bound, on published costs; about three minutes.
bench-planning: install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.plans.planning \
		--out bench/results/planning.json --plot bench/results/planning.svg

# Peak memory and time of a step with activations kept, swapped and computed again; about ten minutes.
bench-swapping: install
	MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=0 OMP_NUM_THREADS=1 \
		$(BIN)/python -m bench.models.swapping --tokens 65536 --out bench/results/swapping.json

# The problems of MiniMalloc, in bench/data; another folder of such CSV files: make bench-placement DATA=folder
bench-placement: install
	$(BIN)/python -m bench.plans.placement $(if $(DATA),--data $(DATA)) --out bench/results/placement.json

demo: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 examples/train.py \
		--plan --dim 64 --tokens 16384 --longest 2048 --device-tokens 768 --steps 24 --learning-rate 3e-3

clean:
	rm -rf $(VENV) $(TOOLS) $(NEWEST) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
