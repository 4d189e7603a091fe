"""Checks of Slurm: its programs and controller, partitions, requeueing, and the job that this runs in."""

from __future__ import annotations

import re
import shutil

from adaptive.doctor.finding import Check, CheckSettings, Finding, error, ok, skipped, warning
from adaptive.doctor.programs import run_program

PROGRAMS = ("sbatch", "srun", "scontrol")
SECONDS = 10.0


def _absent(settings: CheckSettings) -> Finding | None:
    """Return why Slurm cannot be asked, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    inside = "SLURM_JOB_ID" in settings.environment
    if len(missing) == len(PROGRAMS) and not inside:
        return skipped("no Slurm here")
    if missing:
        found = f"{', '.join(missing)} not on PATH{', inside a job' if inside else ''}"
        return warning(found, "apt-get install -y slurm-client   # or: module load slurm")
    return None


def _ask(settings: CheckSettings, *words: str) -> str | Finding:
    """Return what scontrol prints, or why it cannot be asked, as skipped: the check of the controller reports it."""
    if absent := _absent(settings):
        return skipped(absent.found)
    ended = run_program(["scontrol", *words], SECONDS)
    return ended.out if ended.code == 0 else skipped(f"Slurm's controller does not answer: {ended.reason}")


def _records(text: str) -> list[dict[str, str]]:
    """Return the fields of the lines that scontrol prints with -o."""
    return [dict(re.findall(r"(?:^| )([A-Za-z:/_]+)=(\S*)", line)) for line in text.splitlines()]


def controller(settings: CheckSettings) -> Finding:
    """Check that Slurm's programs are on PATH, and that its controller answers."""
    if absent := _absent(settings):
        return absent
    ended = run_program(["scontrol", "ping"], SECONDS)
    states = " ".join(ended.out.split())
    if ended.code != 0 or "UP" not in states:
        reason = states or ended.reason
        bad = error if "SLURM_JOB_ID" in settings.environment else warning
        return bad(f"Slurm's controller does not answer: {reason}", "scontrol ping   # ask the administrators")
    return ok(states)


def partitions(settings: CheckSettings) -> Finding:
    """List partitions with their time limits and preemption; at least one must be up."""
    said = _ask(settings, "-o", "show", "partition")
    if isinstance(said, Finding):
        return said
    shown, up = [], 0
    for one in _records(said):
        up += one.get("State") == "UP"
        star = "*" if one.get("Default") == "YES" else ""
        state = "" if one.get("State") == "UP" else f", {one.get('State', 'unknown')}"
        mode = one.get("PreemptMode", "OFF")
        shown.append(
            f"{one.get('PartitionName')}{star}: {one.get('TotalNodes')} nodes, at most {one.get('MaxTime')}"
            f"{'' if mode == 'OFF' else f', preempted by {mode}'}{state}"
        )
    found = "; ".join(shown)
    return ok(found) if up else warning(f"no partition is up: {found or 'there is none'}", "sinfo -R")


def requeue(settings: CheckSettings) -> Finding:
    """Check that jobs may be queued again, which continues a preempted run."""
    said = _ask(settings, "show", "config")
    if isinstance(said, Finding):
        return said
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", said, flags=re.MULTILINE))
    times = f"KillWait {config.get('KillWait', '?')}, PreemptType {config.get('PreemptType', '?')}"
    if config.get("JobRequeue") == "0":
        return warning(f"jobs are not requeued by default (JobRequeue 0), {times}", "sbatch --requeue ...")
    return ok(f"jobs are requeued (JobRequeue {config.get('JobRequeue', '?')}), {times}")


def job(settings: CheckSettings) -> Finding:
    """Check the environment of the job that this runs in: ranks as Slurm has them, no more tasks than GPUs."""
    given = settings.environment
    if "SLURM_JOB_ID" not in given:
        return skipped("not inside a job")
    for ours, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        # A launcher inside the job counts for itself; srun's own tasks must agree with what was exported before.
        if (
            "SLURM_STEP_ID" in given
            and "TORCHELASTIC_RUN_ID" not in given
            and given.get(ours, given.get(theirs)) != given.get(theirs)
        ):
            found = f"{ours}={given[ours]}, but {theirs}={given.get(theirs)}"
            return error(
                f"{found}: left over from another start", "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT"
            )
    gpus, tasks = given.get("SLURM_GPUS_ON_NODE", ""), given.get("SLURM_NTASKS_PER_NODE", "")
    visible = [one for one in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    if gpus.isdigit() and tasks.isdigit() and int(tasks) > int(gpus) > 0:
        return error(f"{tasks} tasks per node for {gpus} GPUs", f"sbatch --ntasks-per-node {gpus} ...")
    if gpus.isdigit() and len(visible) > int(gpus):
        return warning(f"{len(visible)} GPUs are visible, {gpus} were given", "unset CUDA_VISIBLE_DEVICES")
    nodes, number = given.get("SLURM_JOB_NUM_NODES", "?"), given["SLURM_JOB_ID"]
    return ok(f"job {number}: {given.get('SLURM_NTASKS', '1')} tasks on {nodes} nodes, {gpus or 'no'} GPUs on this one")


def expected_hosts(settings: CheckSettings) -> dict[int, str]:
    """Return the node on which srun started each rank, as far as Slurm says; empty elsewhere."""
    given = settings.environment
    nodes = given.get("SLURM_STEP_NODELIST", "")
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", given.get("SLURM_STEP_TASKS_PER_NODE", "")):
        tasks += [int(count)] * int(times or 1)
    if not nodes or not tasks or shutil.which("scontrol") is None:
        return {}
    names = run_program(["scontrol", "show", "hostnames", nodes], SECONDS).out.split()
    ranked = [name for name, count in zip(names, tasks, strict=False) for _ in range(count)]
    return dict(enumerate(ranked))


CHECKS = [
    Check("slurm", "slurm", controller),
    Check("partitions", "slurm", partitions),
    Check("requeue", "slurm", requeue),
    Check("job", "slurm", job),
]
