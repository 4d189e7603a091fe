"""What processes that do not end are doing, for a failed test to show: a hang may not come twice."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil


def stacks(processes: Iterable[psutil.Process]) -> str:
    """Return each process's threads, with what the kernel says of them, and their stacks where gdb is installed."""
    return "\n".join(_process(process) for process in processes)


def _process(process: psutil.Process) -> str:
    try:
        head = f"process {process.pid}, child of {process.ppid()}, {process.status()}: {process.cmdline()[:4]}"
    except psutil.NoSuchProcess:
        return f"process {process.pid} is gone"
    threads = [_thread(folder) for folder in sorted(Path(f"/proc/{process.pid}/task").glob("*"))]
    return "\n".join([head, *threads, _native(process.pid)])


def _thread(folder: Path) -> str:
    found = []
    for name in ("comm", "wchan", "syscall", "stack"):
        try:
            found.append(" < ".join((folder / name).read_text().split("\n")).strip(" <"))
        except OSError:
            found.append("?")
    return f"  thread {folder.name}: " + " | ".join(found)


def _native(pid: int) -> str:
    if shutil.which("gdb") is None:
        return "  (no gdb)"
    command = ["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all backtrace 40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "  (gdb did not end)"
    frames = [line for line in done.stdout.splitlines() if line.startswith(("#", "Thread"))]
    return "\n".join(f"  {line[:200]}" for line in frames)
