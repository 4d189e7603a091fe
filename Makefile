# make quickstart  sets everything up and trains a first adaptive network on real images, on two CPU ranks
# make test        lint, types and all tests
# make bench       measures the training step on this machine

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
# DeepSpeed's compiled operator belongs to this environment: two environments that share a cache rebuild it in turns.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: quickstart setup test lint types unit bench clean

quickstart: setup
	@test -f data/digits/index.json || $(BIN)/adaptive pack builtin:digits data/digits
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_gpus 2 launcher/train.py configs/quickstart.yaml train.run_folder=$(RUN)
	@$(BIN)/adaptive evaluate $(RUN) --workers 0
	@echo
	@echo "Made: data/digits (scanned digits as WebDataset shards) and $(RUN):"
	@echo "  $(RUN)/evaluation_test.png    accuracy against multiply-adds"
	@echo "  $(RUN)/evaluation_test.json   the same as numbers"
	@echo "  $(RUN)/training.png           loss and every exit's accuracy over the steps"
	@echo "  $(RUN)/metrics.jsonl          every record of the training"
	@echo "  $(RUN)/checkpoints            to continue from, or to deploy"
	@echo "Try next, after '. $(VENV)/bin/activate':"
	@echo "  adaptive pack FOLDER data/mine --hold-out 500        your own images, one folder per class"
	@echo "  adaptive train configs/quickstart.yaml data.path=data/mine data.image_size=64 train.run_folder=runs/mine"

setup: $(VENV)/ready

$(VENV)/ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[digits,test]'
	@touch $@

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGUMENTS)

bench: setup
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
