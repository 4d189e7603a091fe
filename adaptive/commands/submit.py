"""``adaptive submit CONFIG``: submit a training as a Slurm job, with its code frozen in the run folder."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive.foreign_text import redacted, say, shell_words

if TYPE_CHECKING:
    from adaptive.config.sections import Config
    from adaptive.jobs.submission import Resources
    from adaptive.planning.checked_plan import CheckedPlan

EPILOG = """\
What the job trains is written to RUN/submitted: the complete configuration, and a copy of the code, so that later
changes of either reach no job that waits or is requeued. RUN/code_version.json names the commit. Variables of the
batch scripts (ADAPTIVE_MODULES, ADAPTIVE_SETUP, ADAPTIVE_CONTAINER, ...; docs/slurm.md) are kept as they are now."""
PASSED_ON = ("partition", "account", "qos", "constraint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="YAML configuration, for example configs/imagenet/ge.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=10")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--gpus-per-node", type=_positive, metavar="G", help="GPUs, and so ranks, per node (1)")
    parser.add_argument("--cpus-per-gpu", type=_positive, metavar="C", help="CPUs per rank (data.workers + 1)")
    parser.add_argument("--cpu", action="store_true", help="ask for no GPU; ranks are as --ranks-per-node says")
    parser.add_argument("--ranks-per-node", type=_positive, metavar="R", help="ranks per node with --cpu (1)")
    parser.add_argument("--time", metavar="T", help="time limit as Slurm writes it, for example 24:00:00")
    parser.add_argument("--partition", metavar="P", help="partition")
    parser.add_argument("--account", metavar="A", help="account that is charged")
    parser.add_argument("--qos", metavar="Q", help="quality of service")
    parser.add_argument("--constraint", metavar="C", help="features that the nodes must have")
    parser.add_argument("--mail-user", metavar="ADDRESS", help="gets a mail when the job ends, fails or is requeued")
    parser.add_argument("--name", metavar="NAME", help="job name; by default the run folder's")
    parser.add_argument(
        "--seeds", metavar="A-B", help="one run per seed, in folders seed-N: 0-4 or 1,5,9 (%%2: two at once)"
    )
    parser.add_argument("--evaluate", action="store_true", help="measure the run in a second job, after this one")
    parser.add_argument("--after", metavar="JOBID", help="start when that job has ended well")
    parser.add_argument("--stage", metavar="DIR", help="bring the shards to DIR on every node before training")
    parser.add_argument(
        "--sbatch-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further #SBATCH line as it is: --sbatch-option=--exclude=node7",
    )
    parser.add_argument("--no-requeue", action="store_true", help="do not start again after preemption or a time limit")
    parser.add_argument("--dry-run", action="store_true", help="show the script; write and submit nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command."""
    from adaptive.config.loading import load_config
    from adaptive.jobs.submission import (
        check_time,
        freeze,
        render_evaluation,
        render_training,
        seed_numbers,
        submitting,
    )
    from adaptive.training.starting.settings import complete

    # The job begins with the settings that its weights decide today; what is frozen leaves none open.
    config = complete(load_config(arguments.config, arguments.overrides))
    if arguments.stage:
        os.environ["ADAPTIVE_STAGE"] = arguments.stage
    resources = _resources(arguments, config)
    check_time(resources)
    configs = _configs(config, seed_numbers(resources.seeds) if resources.seeds else None, resources.name)
    plans = [checks(one, resources) for one in configs.values()]
    resources = _with_memory(resources, plans[0])
    script = render_training(config, resources)
    evaluation = render_evaluation(config, resources, "JOB") if arguments.evaluate else None
    folder = Path(str(config.train.run_folder)).absolute()
    if arguments.dry_run:
        _show(arguments, script, evaluation)
        return 0
    with submitting(folder):
        _refuse_second(folder)
        told = _submit(freeze(configs, folder, script), folder, config, resources, arguments.evaluate)
    _tell(arguments, told)
    return 0


def _submit(path: Path, folder: Path, config: Config, resources: Resources, evaluate: bool) -> dict[str, Any]:
    """Give the frozen script to Slurm, and return what is told and kept of the job."""
    from adaptive.files import write_atomically
    from adaptive.jobs.requeue import HISTORY
    from adaptive.jobs.submission import render_evaluation, slurm, write_script

    told: dict[str, Any] = {"job": slurm("sbatch", "--parsable", str(path)).partition(";")[0], "script": str(path)}
    told["log"] = str(folder / (f"slurm-{told['job']}.log" if not resources.seeds else f"slurm-{told['job']}-SEED.log"))
    told["run_folder"] = str(folder)
    told["history"] = str((folder / "seed-SEED" if resources.seeds else folder) / HISTORY)
    write_atomically(path.with_name("job.json"), json.dumps(told))  # before anything else may fail: it is in the queue
    if evaluate:
        second = path.with_name("evaluate.sbatch")
        write_script(second, render_evaluation(config, resources, told["job"]))
        told["evaluate_job"] = slurm("sbatch", "--parsable", str(second)).partition(";")[0]
        write_atomically(path.with_name("job.json"), json.dumps(told))
    return told


def checks(config: Config, resources: Resources) -> CheckedPlan:
    """Make the checks here that would fail in the job (raises AdaptiveError): a plan's, and those of the run folder."""
    from adaptive.errors import MachineError
    from adaptive.planning.checked_plan import check_plan
    from adaptive.training.preflight import check_links, check_run_folder

    folder = Path(str(config.train.run_folder)).absolute()
    if "\\" in str(folder):
        raise MachineError(f"train.run_folder = {str(folder)!r}: sbatch writes no log below a name with a backslash")
    if os.pathsep in str(folder):
        reason = "PYTHONPATH can name no code below a name with a colon; choose another folder"
        raise MachineError(f"train.run_folder = {str(folder)!r}: {reason}")
    checked = check_plan(config, resources.nodes, resources.ranks_per_node)
    check_run_folder(next(path for path in (folder, *folder.parents) if path.exists()))
    check_links(folder)
    return checked


def _with_memory(resources: Resources, checked: CheckedPlan) -> Resources:
    """Add the memory that a node's ranks take, and a quarter, where the user leaves it open.

    By Slurm's default they may be killed; the plan counts neither W&B's process nor what a decoder needs at its peak.
    """
    from adaptive.jobs.submission import memory_is_said, nodes_have_memory
    from adaptive.planning.plan import make_plan

    if memory_is_said(resources.extra) or not nodes_have_memory():
        return resources
    return replace(resources, memory=make_plan(checked, cuda=resources.gpus).host.node * 5 // 4)


def _resources(arguments: argparse.Namespace, config: Config) -> Resources:
    from adaptive.errors import UsageError
    from adaptive.jobs.submission import Resources, seconds

    if arguments.cpu and arguments.gpus_per_node:
        raise UsageError("--cpu asks for no GPU, --gpus-per-node for some; leave one out")
    if arguments.ranks_per_node and not arguments.cpu:
        raise UsageError("--ranks-per-node is for --cpu; with GPUs there is one rank per GPU (--gpus-per-node)")
    if arguments.after is not None and not arguments.after.replace("_", "").isdecimal():
        raise UsageError(f"--after {arguments.after!r}: give the number of a job")
    if arguments.time is not None:
        seconds(arguments.time)
    options = [(name, getattr(arguments, name)) for name in PASSED_ON if getattr(arguments, name) is not None]
    if arguments.mail_user is not None:
        options += [("mail-user", arguments.mail_user), ("mail-type", "END,FAIL,REQUEUE")]
    return Resources(
        nodes=arguments.nodes,
        ranks_per_node=(arguments.ranks_per_node if arguments.cpu else arguments.gpus_per_node) or 1,
        cpus_per_rank=arguments.cpus_per_gpu or config.data.workers + 1,
        gpus=not arguments.cpu,
        time=arguments.time,
        name=arguments.name or Path(str(config.train.run_folder)).name,
        requeue=not arguments.no_requeue,
        seeds=arguments.seeds,
        after=arguments.after,
        options=tuple(options),
        extra=tuple(arguments.sbatch_option),
    )


def _configs(config: Config, seeds: list[int] | None, group: str) -> dict[str, Config]:
    """Return the configurations to freeze, by file name: one, or one for each seed."""
    from adaptive.jobs.requeue import of_seed

    if seeds is None:
        return {"config.yaml": config}
    return {f"config-{seed}.yaml": of_seed(config, seed, group) for seed in seeds}


def _refuse_second(folder: Path) -> None:
    """Refuse a run folder that belongs to a job in the queue (raises MachineError)."""
    from adaptive.errors import MachineError
    from adaptive.jobs.submission import slurm

    record = folder / "submitted" / "job.json"
    if not record.is_file():
        return
    try:
        job = str(json.loads(record.read_text(encoding="utf-8"))["job"])
        if not job.replace("_", "").isdecimal():  # the message below is to be pasted
            return
        listed = slurm("squeue", "--noheader", "--format=%T", "--jobs", job)
    except (ValueError, KeyError, TypeError, MachineError):  # an id that Slurm has forgotten is refused by it
        return
    if listed:
        raise MachineError(
            f"train.run_folder = {str(folder)!r} belongs to job {job} ({listed.split()[0].lower()}), which goes on by "
            f"itself when it is requeued; scancel {job} first, or choose another folder"
        )


def _show(arguments: argparse.Namespace, script: str, evaluation: str | None) -> None:
    script, evaluation = redacted(script), None if evaluation is None else redacted(evaluation)
    if arguments.json:
        print(json.dumps({"script": script, "evaluate_script": evaluation}))
    else:
        print(script, end="")
        if evaluation is not None:
            print(f"\n# --- and after it ---\n{evaluation}", end="")


def _tell(arguments: argparse.Namespace, told: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(told))
        return
    job = told["job"]
    say(f"submitted  job {job}: {told['script']}")
    if "evaluate_job" in told:
        say(f"           job {told['evaluate_job']} measures the run after it")
    say(f"log        {told['log']}")
    say(f"follow     tail -F {shell_words(told['log'])}")
    say(f"status     squeue -j {job}; starts and ends: {told['history']}")
    say(f"make room  scancel --batch --signal=USR1 {job}    (saves, is requeued, goes on)")
    say(f"stop       scontrol update JobId={job} Requeue=0 && scancel --batch --signal=USR1 {job}    (saves, ends)")
    say(f"cancel     scancel {job}    (ends within Slurm's KillWait)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)
