"""Train a configuration, alone or on many ranks: ``deepspeed --num_gpus 2 launcher/train.py CONFIG [key=value ...]``.

The same script starts under torchrun and srun, and behind ``adaptive train``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

if __package__ in (None, ""):  # started as a script: make the checkout importable also where it is not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from adaptive.config_loading import dump_config, load_config
from adaptive.errors import AdaptiveError, StoppedError
from launcher.requeue import leave_word

DESCRIPTION = "Train a network with early exits. An existing run folder is continued."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", nargs="?", help="YAML configuration, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=10")
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    parser.add_argument("--help-config", action="store_true", help="explain every configuration key and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    if arguments.help_config:
        from adaptive.config_reference import configuration_reference

        print(configuration_reference(), end="")
        return 0
    if arguments.config is None:
        raise AdaptiveError("no configuration given; try: adaptive train configs/quickstart.yaml")
    config = load_config(arguments.config, [*sweep_overrides(os.environ), *arguments.overrides])
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    # torch's own warnings of peers that leave would bury what a run says of its end.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Heavy imports only now, so that --help and wrong keys answer at once.
    from adaptive.training.engine import leave
    from adaptive.training.run import limit_threads, prepare, supervise, train
    from launcher.environment import find_ranks
    from launcher.provenance import origin

    # It warns of a missing CUDA runtime, which is no fault: DeepSpeed imports it on machines without a GPU too.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    ranks = find_ranks()
    limit_threads()
    supervisor = supervise(config, ranks)
    try:
        prepared = prepare(config, ranks)
        folder = train(prepared, supervisor, origin(prepared.folder, ranks) if ranks.rank == 0 else None)
    except AdaptiveError as error:
        stopped = isinstance(error, StoppedError)
        supervisor.end(failed=not stopped, words="" if stopped else str(error))
        if ranks.rank and not stopped:
            time.sleep(3)  # what fails on every rank is said by the first; the launcher ends the others meanwhile
        raise
    except Exception as error:
        supervisor.end(failed=True, words=repr(error))
        raise
    supervisor.end()
    leave()
    if ranks.rank == 0:
        print(f"trained: {folder}\nnext: adaptive evaluate {folder}")
    return 0


def sweep_overrides(environment: Mapping[str, str]) -> list[str]:
    """Give every run of a W&B sweep's agent a folder of its own; an override on the command line still counts more."""
    sweep, run_id = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
    return [f"train.run_folder=runs/sweeps/{sweep}/{run_id}"] if sweep and run_id else []


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(prog="train.py", description=DESCRIPTION)
    add_arguments(parser)
    try:
        code = run(parser.parse_intermixed_args())
    except AdaptiveError as error:
        if line := error.told("train", int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))):
            print(line, file=sys.stderr, flush=True)
        code = error.exit_code
    except Exception:
        traceback.print_exc()  # a fault of ours; leave as below all the same
        code = 1
    leave_word(code)
    sys.stdout.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # a group with a failed peer may abort or hang in its destructors
    sys.exit(code)


if __name__ == "__main__":
    main()
