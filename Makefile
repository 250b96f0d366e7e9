.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-e2e test-slurm test-gpu lint format typecheck bench clean

# Everything runs in .venv, made by .ci/install.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Open MPI: as root (containers, CI), and with more ranks than cores.
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1
export OMPI_MCA_rmaps_base_oversubscribe ?= 1
export OMPI_MCA_mpi_yield_when_idle ?= 1
export OMP_NUM_THREADS := 1
# The tests start some hundred processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

BENCH := --size 1GiB --dir runs/bench --against raw,dcp

help: ## this list
	@grep -hE '^[a-z0-9%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

install: ## system packages, .venv, an h5py with MPI: whatever is missing
	@.ci/install

demo: install ## train on 4 ranks, kill, resume on 2, compare the losses
	python examples/demo.py

test: install ## everything: lint, types, unit, MPI and end-to-end tests
	@python .ci/test.py

test-unit: install ## tests without MPI
	pytest tests/unit

test-%: install ## the MPI tests on % ranks, as in make test-4
	timeout --kill-after=10 900 mpirun -n $* python -m pytest --with-mpi tests/mpi

test-e2e: install ## tests that start mpirun themselves: N to M ranks, kills, examples
	pytest tests/e2e

test-slurm: install ## launch/slurm.sbatch under a real Slurm, on two virtual nodes of this machine: 2 minutes
	pytest tests/slurm

test-gpu: install ## the tests of CUDA devices, a rank per device and at least two; without one they are skipped
	pytest -m gpu tests/unit
	mpirun -n $$(python -c 'import torch; print(max(2, torch.cuda.device_count()))') \
		python -m pytest --with-mpi -m gpu tests/mpi

lint: install ## ruff: rules and format; shellcheck, where it is installed
	ruff check .
	ruff format --check .
	! command -v shellcheck >/dev/null || shellcheck -x launch/*.s* .ci/install .ci/rank .ci/run

format: install ## ruff: fix and format in place
	ruff check --fix .
	ruff format .

typecheck: install ## mypy --strict
	mypy

bench: install ## durable save and warm restore against the disk's limit and DCP
	mpirun -n 2 python -m distckpt bench $(BENCH)

clean: ## back to a fresh clone
	rm -rf .venv .reports .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
