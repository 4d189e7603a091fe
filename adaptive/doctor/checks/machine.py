"""Checks of the machine: shared memory, limits of the process, and the memory and cores that it may really use."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import psutil

from adaptive.distributed.control_group import cpu_quota, memory_limit, process_limit
from adaptive.doctor.finding import Check, CheckSettings, Finding, error, ok, warning

MIB, GIB = 2**20, 2**30
WORKERS = 2  # the default of data.workers
FILES_NEEDED, FILES_LEAST = 4096, 512


def shm(settings: CheckSettings, folder: str = "/dev/shm") -> Finding:
    """Check shared memory, through which loader processes hand over batches."""
    if not Path(folder).is_dir():
        return error(
            f"there is no {folder}; loader processes need it", f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}"
        )
    total, _, free = shutil.disk_usage(folder)
    shown = f"{_size(free)} of {_size(total)} free in {folder}"
    if not os.access(folder, os.W_OK):
        return error(f"{folder} cannot be written; loader processes need it", f"chmod 1777 {folder}")
    larger = f"docker run --shm-size=8g ...   # or mount -o remount,size=8G {folder}; data.workers=0 does without"
    if total <= 64 * MIB or free < 64 * MIB * settings.local_ranks:
        what = "a container's default" if total == 64 * MIB else "little for loader processes"
        return warning(f"{shown}: {what}; batches of 224 pixels take some 40 MiB each", larger)
    return ok(shown)


def open_files(_: CheckSettings) -> Finding:
    """Check the limit of open files: shards, sockets and pipes of loader processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = f"{_limit(soft)} open files (at most {_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < FILES_NEEDED:
        reach = FILES_NEEDED if hard == resource.RLIM_INFINITY else min(hard, FILES_NEEDED)
        remedy = (
            f"ulimit -n {reach}"
            if reach > soft
            else "limits.conf: * hard nofile 65536, or docker run --ulimit nofile=65536"
        )
        return (error if soft < FILES_LEAST else warning)(f"only {shown}", remedy)
    return ok(shown)


def processes(settings: CheckSettings) -> Finding:
    """Check the limit of this user's processes and threads."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    pids = process_limit()
    allowed = min([n for n in (soft, -1 if pids is None else pids) if n >= 0], default=-1)
    needed = 256 * settings.local_ranks
    if 0 <= allowed < needed:
        remedy = f"ulimit -u {4 * needed}   # or docker run --pids-limit {4 * needed}"
        return warning(f"only {allowed} processes and threads; {_ranks(settings)} may start {needed}", remedy)
    return ok(f"{_limit(allowed)} processes and threads")


def locked_memory(_: CheckSettings) -> Finding:
    """Check the limit of locked memory, which pinned buffers and InfiniBand need."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else _size(soft)
    infiniband = any(Path("/sys/class/infiniband").glob("*"))
    if infiniband and soft != resource.RLIM_INFINITY and soft < 64 * MIB:
        return warning(f"{shown} of locked memory, and an InfiniBand card that wants more", "ulimit -l unlimited")
    return ok(f"{shown} of locked memory")


def address_space(_: CheckSettings) -> Finding:
    """Check the limit of address space, far more of which is reserved than used."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < 64 * GIB:
        return warning(
            f"address space is limited to {_size(soft)}; CUDA and threads reserve more", "ulimit -v unlimited"
        )
    return ok("unlimited" if soft == resource.RLIM_INFINITY else _size(soft))


def memory(settings: CheckSettings) -> Finding:
    """Check the machine's memory, and how much of it a container or job may use."""
    machine = psutil.virtual_memory()
    limit, used = memory_limit()
    shown = f"{_size(machine.available)} of {_size(machine.total)} available"
    free = machine.available
    if limit is not None and limit < machine.total:
        free = min(free, limit - used)
        shown += f", of which this container or job may use {_size(limit)} and has {_size(max(free, 0))} left"
    if free < 2 * GIB * settings.local_ranks:
        remedy = "srun --mem=0 ...   # or docker run --memory=16g; a smaller train.micro_batch takes less"
        return warning(f"{shown}: little for {_ranks(settings)}", remedy)
    return ok(shown)


def cores(settings: CheckSettings) -> Finding:
    """Check that there are cores for the ranks of this machine and their loader processes."""
    usable = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    shown = f"{usable} of {psutil.cpu_count() or usable} cores"
    if quota is not None and quota < usable:
        shown += f", but only the time of {quota:g}"
        usable = max(1, int(quota))
    each = usable // settings.local_ranks
    if each < 1:
        return warning(f"{shown} for {_ranks(settings)}", f"deepspeed --num_gpus {usable} ...")
    if quota is not None and quota < len(os.sched_getaffinity(0)) and not os.environ.get("OMP_NUM_THREADS"):
        return warning(f"{shown}: threads would fight for it", f"export OMP_NUM_THREADS={max(1, each)}")
    if each < WORKERS + 1:
        what = f"{shown} for {_ranks(settings)} with {WORKERS} loader processes each"
        return warning(what, f"adaptive train CONFIG data.workers={max(0, each - 1)}")
    return ok(f"{shown} for {_ranks(settings)}: up to data.workers={each - 1} each")


def _ranks(settings: CheckSettings) -> str:
    return "1 rank" if settings.local_ranks == 1 else f"{settings.local_ranks} ranks"


def _limit(value: int) -> str:
    return "unlimited" if value < 0 or value == resource.RLIM_INFINITY else str(value)


def _size(number: float) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / MIB:.0f} MiB"


CHECKS = [
    Check("shm", "machine", shm),
    Check("open-files", "machine", open_files),
    Check("processes", "machine", processes),
    Check("locked-memory", "machine", locked_memory),
    Check("address-space", "machine", address_space),
    Check("memory", "machine", memory),
    Check("cores", "machine", cores),
]
