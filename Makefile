# make quickstart  sets everything up and trains a first adaptive network on real images, on two CPU ranks
# make test        lint, types, and the tests of every path through the code: about twelve minutes on 2 cores
# make test-all    the same with every backbone family, recipe, kill, job on Slurm and reference configuration
# make test-versions  numerics, data, two ranks and export with the oldest and newest torch, on Python 3.11 to 3.13; PAIRS=all
# make gpu         tests, tables and a training on a GPU, in ten minutes; ARGS='--minutes 5 --resume', ARGS=--rehearse on a CPU
# make ablation SOURCE=FOLDER  one technique more each time, several seeds, on CIFAR-10
# make bench       all benchmarks that need nothing but this machine; PARTS='data startup' some of them, SOURCE=PHOTOS
# make bench-inference TRAINED=RUN  real early exit against the clock, with a trained run's network
# make backbones   takes a model of every timm class the whole way (those that docs/reference/backbones.md lacks)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
WORKERS ?= 2
# Many tests wait for others (Slurm, a kill, a time limit): more at a time than there are cores keep these busy.
TEST_WORKERS ?= 3
export OMP_NUM_THREADS ?= 1
# DeepSpeed's compiled operator belongs to this environment: two environments that share a cache rebuild it in turns.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
# pytest rewrites every test module, and hypothesis: anew in every worker where it may not keep what it wrote.
export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart setup test test-all test-versions gpu lint types unit unit-all unit-full bench bench-inference ablation backbones clean

quickstart: setup
	@test -f data/digits/index.json || $(BIN)/adaptive pack builtin:digits data/digits
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed --num_gpus 2 launcher/train.py configs/quickstart.yaml train.run_folder=$(RUN)
	@$(BIN)/adaptive evaluate $(RUN) --workers 0
	@$(BIN)/adaptive calibrate $(RUN) --budget 0.5 --workers 0
	@$(BIN)/adaptive report $(RUN) --workers 0
	@echo
	@echo "Made: data/digits (scanned digits as WebDataset shards) and $(RUN):"
	@echo "  $(RUN)/report.html            open this: curves, who leaves where, easy and hard images"
	@echo "  $(RUN)/policy.json            who leaves where, for half of the full cost"
	@echo "  $(RUN)/evaluation_test.png    accuracy against multiply-adds"
	@echo "  $(RUN)/evaluation_test.json   the same as numbers"
	@echo "  $(RUN)/training.png           loss and every exit's accuracy over the steps"
	@echo "  $(RUN)/metrics.jsonl          every record of the training"
	@echo "  $(RUN)/checkpoints            to continue from, or to deploy"
	@echo "Try next, after '. $(VENV)/bin/activate':"
	@echo "  adaptive predict $(RUN) IMAGE...            classify images, each only as deep as it needs"
	@echo "  adaptive pack FOLDER data/mine --hold-out 500 --hold-out-test 500   your own images, one folder per class"
	@echo "  adaptive train configs/quickstart.yaml data.path=data/mine data.image_size=64 train.run_folder=runs/mine"

setup: $(VENV)/ready

$(VENV)/ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[digits,test]'
	@touch $@

test: lint types unit

test-all: lint types unit-all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x slurm/*.sbatch slurm/lib.sh .ci/run

types: setup
	$(BIN)/mypy

# File by file in the order of tests/conftest.py, which begins with those that take longest.
PYTEST = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -p tests.helpers.second_try \
	-n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

unit: setup
	$(PYTEST) -m "not full" $(PYTEST_ARGUMENTS)

unit-all: setup
	$(PYTEST) $(PYTEST_ARGUMENTS)

# What test-all has beyond test.
unit-full: setup
	$(PYTEST) -m full $(PYTEST_ARGUMENTS)

# PREPARE=1 fetches torch for the environments alone.
test-versions: setup
	$(BIN)/python -m tests.versions $(PAIRS) --workers $(TEST_WORKERS) $(if $(FOLDER),--folder "$(FOLDER)") \
		$(if $(PREPARE),--prepare)

# Without setup: a GPU machine may have no network, and its own Python with torch.
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

bench: setup
	$(BIN)/python benchmarks/suite.py $(if $(PARTS),--only $(PARTS)) $(if $(SOURCE),--source "$(SOURCE)")

bench-inference: setup
	@test -n "$(TRAINED)" || { echo "give the folder of a trained run: make bench-inference TRAINED=runs/..."; exit 2; }
	$(BIN)/python benchmarks/inference.py "$(TRAINED)"

ablation: setup
	@test -n "$(SOURCE)" || { echo "give the folder of CIFAR-10's class folders: make ablation SOURCE=FOLDER"; exit 2; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/ablation.py --source "$(SOURCE)" --jobs $(WORKERS)

backbones: setup
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/backbones.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
