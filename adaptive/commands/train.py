"""``adaptive train CONFIG [key=value ...]``: training, alone or as one of many ranks.

launcher/train.py is the same, for the deepspeed launcher, torchrun and srun.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping

from adaptive.config.loading import dump_config, load_config
from adaptive.config.sections import Config
from adaptive.distributed.launchers import announced_rank, one_of_several
from adaptive.errors import EXIT_PASSING, AdaptiveError, StoppedError, refusal
from adaptive.foreign_text import say, shell_words, shown, without_secrets
from adaptive.jobs.code_version import check_frozen_code
from adaptive.jobs.requeue import leave_exit_code
from adaptive.passing_faults import exit_code_of, passing, told
from adaptive.requirements import missing_package
from adaptive.standard_streams import observe_only

NAMES_WITHIN = 180.0  # seconds in which a late node's name gets known
REFUSAL_WITHIN = 20.0  # seconds that a rank which cannot start takes to tell the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", nargs="?", help="YAML configuration, for example configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=10")
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    parser.add_argument("--help-config", action="store_true", help="explain every configuration key and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; one of several ranks leaves its exit code for the batch script, and ends the process."""
    if arguments.help_config or arguments.print_config:
        return _show(arguments)
    observe_only()  # the result is the trained network
    try:
        check_frozen_code()
        code = _train(_configuration(arguments))
    except AdaptiveError as error:
        code = _leave_in_a_line(error, error)
    except Exception as error:
        known: AdaptiveError | None = None
        if isinstance(error, ImportError):
            known = missing_package(error)
        elif passing(error):
            known = told(error)
        elif isinstance(error, OSError):
            known = refusal(error)
        if known:
            code = _leave_in_a_line(known, error)
        else:  # a fault of ours is told whole; leave as below all the same
            say(*traceback.format_exc().splitlines(), file=sys.stderr)
            code = 1
    leave_exit_code(code)
    sys.stdout.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)  # a group with a failed peer may abort or hang in its destructors
    return code


def _leave_in_a_line(shown: AdaptiveError, error: Exception) -> int:
    """Print an error as one line, and return the exit code, which is left for the batch script first."""
    code = exit_code_of(error)
    leave_exit_code(code)
    _say_error(shown, code == EXIT_PASSING)
    return code


def _show(arguments: argparse.Namespace) -> int:
    if arguments.help_config:
        from adaptive.config.reference import configuration_reference

        print(configuration_reference(), end="")
    else:
        config = _configuration(arguments)
        if config.model.pretrained or config.model.weights or config.model.from_run:
            from adaptive.training.starting.settings import complete

            config = complete(config)
        print(dump_config(without_secrets(config.model_dump())), end="")
    return 0


def _configuration(arguments: argparse.Namespace) -> Config:
    if arguments.config is None:
        raise AdaptiveError("no configuration given; try: adaptive train configs/quickstart.yaml")
    return load_config(arguments.config, [*sweep_overrides(os.environ), *arguments.overrides])


def _train(config: Config) -> int:
    # torch's own warnings of peers that leave would bury what a run says of its end.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Heavy imports only now, so that --help and wrong keys answer at once.
    from adaptive.distributed.ranks import find_ranks
    from adaptive.jobs.provenance import origin
    from adaptive.training.engine.group import leave
    from adaptive.training.run import limit_threads, prepare, supervise, train

    # It warns of a missing CUDA runtime, which is no fault: DeepSpeed imports it on machines without a GPU too.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    ranks = find_ranks(patience=NAMES_WITHIN)
    limit_threads()
    supervisor = supervise(config, ranks)
    try:
        prepared = prepare(config, ranks, supervisor.clock)
        folder = train(prepared, supervisor, origin(prepared.folder, ranks) if ranks.rank == 0 else None)
    except AdaptiveError as error:
        stopped = isinstance(error, StoppedError)
        supervisor.end(failed=not stopped, words="" if stopped else str(error))
        raise
    except Exception as error:
        supervisor.end(failed=True, words=shown(repr(error)))
        raise
    supervisor.end()
    leave()
    if ranks.rank == 0:
        say(f"trained: {folder}", f"next: adaptive evaluate {shell_words(folder)}")
    return 0


def _say_error(error: AdaptiveError, passing: bool) -> None:
    """Print an error, and tell the ranks that wait for this one."""
    rank = announced_rank(os.environ)
    line = error.told("train", rank)
    if rank == 0 and line:
        say(line, file=sys.stderr)
    if not isinstance(error, StoppedError):
        _tell_waiting_ranks(str(error), passing)
        if rank:
            time.sleep(3)  # what fails on every rank is said by the first; the launcher ends the others meanwhile
    if rank and line:
        say(line, file=sys.stderr)


def _tell_waiting_ranks(words: str, passing: bool) -> None:
    """Tell ranks that this one does not come to their meeting; it is over within REFUSAL_WITHIN, told or not."""
    from adaptive.distributed.ranks import find_ranks

    if not one_of_several(os.environ):
        return
    try:
        ranks = find_ranks()
    except AdaptiveError:
        return  # the launcher's own variables are wrong: nobody can be met
    from adaptive.distributed.same_start import refuse_start
    from adaptive.training.engine.group import refuse_group
    from adaptive.training.supervision.peers import host_name

    me = ranks.rank, ranks.world, host_name()
    refuse_group(lambda store: refuse_start(store, *me, words, passing), REFUSAL_WITHIN)


def sweep_overrides(environment: Mapping[str, str]) -> list[str]:
    """Give every run of a W&B sweep's agent a folder of its own; an override on the command line still counts more."""
    sweep, run_id = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
    return [f"train.run_folder=runs/sweeps/{sweep}/{run_id}"] if sweep and run_id else []
