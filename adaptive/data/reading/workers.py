"""Data loader workers: forked processes that are watched by heartbeats, and killed when they hang.

A fork is fast, but the training process has threads (of gloo, NCCL, pinned memory). A lock that one of them holds at
the fork stays locked in the worker for ever; a worker that waits for it inside a library, holding Python's GIL, reacts
to nothing, not even signals. Therefore every worker has a heartbeat, and one whose heartbeat stops is killed.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from mmap import mmap
from multiprocessing.context import ForkContext, ForkProcess
from os import getpid, getppid, kill
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from adaptive.errors import MachineError

HEARTBEAT_EVERY = 1.0  # seconds between two heartbeats of a worker
CHECK_EVERY = 5.0  # seconds between two checks of the heartbeats
MISSED_CHECKS = 12  # in a row without a heartbeat, then a worker is killed: a minute in which this process did run
ASKING = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)  # the training process's, of a process group
_PR_SET_PDEATHSIG = 1  # of prctl: the signal to get when the thread that forked this process ends
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # not looked up in a worker, where it might hang


class HungWorkerError(MachineError):
    """A worker sent no heartbeat for a minute and was killed; another one may do its work."""


def iterate(pipeline: IterableDataset[Any], workers: int, pinned: bool) -> Generator[Any, None, None]:
    """Yield the pipeline's items from so many worker processes (0: from this one); closing the iterator ends them.

    Raises:
        HungWorkerError: a worker hung; the items that were not yielded have to be made again.
        MachineError: a worker died.
    """
    processes = _Workers(workers) if workers else None
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,  # the default one walks through every number
        pin_memory=pinned,
        multiprocessing_context=processes,
        # The loader draws a seed that nothing uses; drawn from torch's own generator, it would change a resumed run.
        generator=torch.Generator(),
    )
    if processes is None:
        yield from loader
        return
    iterator = iter(loader)
    ended = weakref.ref(iterator)
    processes.watch()
    try:
        while (item := processes.next_of(iterator)) is not None:
            yield item
    finally:
        # The loader ends its workers when its iterator is dropped; do not wait for the garbage collector, nor for who
        # keeps an error's traceback.
        del iterator
        if (kept := ended()) is not None:
            kept._shutdown_workers()  # type: ignore[attr-defined]
        processes.end()


def _as_it_is(item: Any) -> Any:
    return item


def shared_memory_error(error: RuntimeError) -> MachineError:
    """Turn torch's error about shared memory for a batch into one with a remedy (raises any other ``error``)."""
    if "shared memory" not in str(error):
        raise error
    return MachineError(
        f"no room in /dev/shm for a batch ({str(error).splitlines()[0]}); lower data.workers or train.micro_batch, or "
        "give it more (docker run --shm-size)"
    )


class _Workers(ForkContext):
    """The multiprocessing context of one DataLoader: forks its workers, and watches their heartbeats.

    Always fork, whatever Python's default: workers end themselves when this process, their parent, has gone.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._heartbeats = mmap(-1, count)  # shared memory; each worker counts up its own byte
        self._started: list[_Worker] = []
        self._waiting = False
        self._hung = ""
        self._stop = threading.Event()

    def Process(self, *arguments: Any, **named: Any) -> _Worker:  # type: ignore[override]  # noqa: N802
        """Return the next worker, for the loader to start."""
        worker = _Worker(*arguments, **named)
        bound = threading.current_thread() is threading.main_thread()
        worker.prepare = partial(_prepare_worker, getpid(), self._heartbeats, len(self._started), bound)
        self._started.append(worker)
        return worker

    def watch(self) -> None:
        """Begin to check heartbeats; all workers have been started."""
        threading.Thread(target=self._watch, name="data-workers", daemon=True).start()

    def next_of(self, iterator: Iterator[Any]) -> Any:
        """Return the loader's next item, None at the end (raises HungWorkerError, MachineError)."""
        self._waiting = True
        try:
            return next(iterator, None)
        except (RuntimeError, EOFError, ConnectionError) as error:
            problem = self._problem(error)
        finally:
            self._waiting = False
        # No error's traceback may keep a reference to the loader, which ends its workers when it is dropped.
        del iterator
        raise problem

    def end(self) -> None:
        """Stop checking heartbeats, and kill the workers that the loader could not end."""
        self._stop.set()
        for worker in self._started:
            if worker.is_alive():
                worker.kill()
                worker.join(CHECK_EVERY)

    def _problem(self, error: Exception) -> Exception:
        """Return what an error of the loader means.

        The loader's handler of SIGCHLD raises in this thread, wherever it is, also when another error has come first:
        a connection that a dying worker has closed. So the worker's end is awaited here.
        """
        until = time.monotonic() + (0 if isinstance(error, RuntimeError) else CHECK_EVERY)
        while True:
            try:
                if time.monotonic() >= until or any(worker.exitcode is not None for worker in self._started):
                    return self._explain(error)
                time.sleep(0.01)
            except RuntimeError:  # the handler's
                continue

    def _explain(self, error: Exception) -> Exception:
        if self._hung:
            return HungWorkerError(self._hung)
        reason = type(error).__name__  # the connection broke while a worker handed over a batch
        if isinstance(error, RuntimeError):
            if "exited unexpectedly" not in str(error) and "DataLoader worker (pid" not in str(error):
                return error
            reason = str(error).splitlines()[0]
        return MachineError(
            f"a data worker died ({reason}): usually out of memory or of /dev/shm; lower data.workers or "
            "train.micro_batch"
        )

    def _watch(self) -> None:
        last, missed = bytes(len(self._started)), [0] * len(self._started)
        while not self._stop.wait(CHECK_EVERY):
            now = self._heartbeats[:]
            missed = [count + 1 if old == new else 0 for count, old, new in zip(missed, last, now, strict=True)]
            last = now
            for worker, count in zip(self._started, missed, strict=True):
                # Only while its batch is waited for: killing a worker raises an exception in the main thread.
                if count >= MISSED_CHECKS and self._waiting and worker.is_alive():
                    silence = f"no heartbeat for {count * CHECK_EVERY:g} s"
                    self._hung = f"data worker {worker.pid} sent {silence}{_process_state(worker)}"
                    worker.kill()


class _Worker(ForkProcess):
    """A worker process that prepares itself before the loader's own code begins, in which it might hang."""

    prepare: Callable[[], None]

    def start(self) -> None:
        """Fork; until the worker has prepared itself it gets no signal of those that ask the training process to stop.

        By the handlers and the pipe that it inherits it would tell the training process of its own signal.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """Do the loader's work."""
        self.prepare()
        super().run()


def _prepare_worker(parent: int, heartbeats: mmap, number: int, bound: bool) -> None:
    """Start this worker's heartbeat, and ignore signals unless they come from the training process, ``parent``.

    Slurm sends signals to every process of a job, workers included; the loader itself ends workers with SIGTERM. A
    worker whose parent was killed ends within a second: otherwise it might wait for ever to hand over its last batch.
    With ``bound`` the kernel kills it, hung or not, when the thread that forked it ends.
    """
    if bound and _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()  # collecting inherited objects costs time, and copies their pages
    signal.set_wakeup_fd(-1)  # inherited with the training process's signals
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ASKING} - {signal.SIGTERM})

    def beat() -> None:
        while getppid() == parent:
            heartbeats[number] = (heartbeats[number] + 1) % 256
            received = signal.sigtimedwait({signal.SIGTERM}, HEARTBEAT_EVERY)
            if received is not None and received.si_pid == parent:
                break
        kill(getpid(), signal.SIGKILL)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def _process_state(worker: _Worker) -> str:
    """Return the kernel's state of a process and the kernel function that it waits in; may be empty."""
    found = []
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        found.append(next(line.split("\t")[1] for line in status if line.startswith("State:")))
        found.append(Path(f"/proc/{worker.pid}/wchan").read_text().strip("0"))
    return "".join(f", {words}" for words in found if words)
