"""Loader processes: how they live and end, and what becomes of those that die or hang.

They are forked, which starts them in a moment, from a process that has threads (of gloo, NCCL, pinned memory). A lock
that such a thread held at that moment stays locked in the worker for ever: one that waits for it inside a library, with
Python's own lock, is deaf to everything. So workers give signs of life, and whoever is silent is ended.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
import threading
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

BEAT = 1.0  # seconds between two signs of life of a worker
LOOK = 5.0  # seconds between two looks at the workers
PATIENCE = 12  # looks in a row that find nothing new of a worker before it is ended: a minute that this process ran
_PR_SET_PDEATHSIG = 1  # of prctl: the signal to get when the thread that forked this process ends
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # not looked up in a worker, where it might hang


class HungWorkerError(MachineError):
    """A worker gave no sign of life for a minute and was killed; another one may do its work."""


def work(pipeline: IterableDataset[Any], workers: int, pinned: bool) -> Generator[Any, None, None]:
    """Yield the pipeline's items, made in so many worker processes (0: in this one); closing it ends them.

    Raises:
        HungWorkerError: a worker hung; the items that were not yielded have to be made again.
        MachineError: a worker died.
    """
    processes = _Workers(workers) if workers else None
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=pinned,
        multiprocessing_context=processes,
        # The loader draws a seed that nothing here uses; from torch's own generator, a resumed run would see the gap.
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
        # The loader ends its workers when its iterator is dropped; do not wait for the garbage collector.
        del iterator
        processes.end(by_force=ended() is None)


def without_room(error: RuntimeError) -> MachineError:
    """Return what to say of torch's refusal of shared memory for a batch (raises ``error`` where it is another)."""
    if "shared memory" not in str(error):
        raise error
    return MachineError(
        f"no room in /dev/shm for a batch ({str(error).splitlines()[0]}); lower data.workers or train.micro_batch, or "
        "give it more (docker run --shm-size)"
    )


class _Workers(ForkContext):
    """Forks one loader's workers, whatever Python's default: this process has to be their parent."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._beats = mmap(-1, count)  # shared with the workers, each of which counts in its own byte
        self._started: list[_Worker] = []
        self._waiting = False
        self._hung = ""
        self._stop = threading.Event()

    def Process(self, *arguments: Any, **named: Any) -> _Worker:  # type: ignore[override]  # noqa: N802
        """Return the next worker, for the loader to start."""
        worker = _Worker(*arguments, **named)
        bound = threading.current_thread() is threading.main_thread()
        worker.settle = partial(_settle, getpid(), self._beats, len(self._started), bound)
        self._started.append(worker)
        return worker

    def watch(self) -> None:
        """Begin to look at the workers; all have been started."""
        threading.Thread(target=self._watch, name="data-workers", daemon=True).start()

    def next_of(self, iterator: Iterator[Any]) -> Any:
        """Return the loader's next item, None at the end (raises HungWorkerError, MachineError)."""
        self._waiting = True
        try:
            return next(iterator, None)
        except (RuntimeError, EOFError, ConnectionError) as error:
            problem = self._explained(error)
        finally:
            self._waiting = False
        # Neither this error nor the loader's, with their tracebacks, may keep the loader.
        del iterator
        raise problem

    def end(self, by_force: bool) -> None:
        """Look no longer; ``by_force``: end those as well that the loader could not end."""
        self._stop.set()
        for worker in self._started if by_force else ():
            if worker.is_alive():
                worker.kill()
                worker.join(LOOK)

    def _explained(self, error: Exception) -> Exception:
        if self._hung:
            return HungWorkerError(self._hung)
        reason = type(error).__name__  # it died while it handed over a batch
        if isinstance(error, RuntimeError):
            if "exited unexpectedly" not in str(error) and "DataLoader worker (pid" not in str(error):
                return error
            reason = str(error).splitlines()[0]
        return MachineError(
            f"a data worker died ({reason}): usually out of memory or of /dev/shm; lower data.workers or "
            "train.micro_batch"
        )

    def _watch(self) -> None:
        seen, silent = bytes(len(self._started)), [0] * len(self._started)
        while not self._stop.wait(LOOK):
            now = self._beats[:]
            silent = [count + 1 if old == new else 0 for count, old, new in zip(silent, seen, now, strict=True)]
            seen = now
            for worker, count in zip(self._started, silent, strict=True):
                # Not before its batch is needed: the death of a worker is an exception in the main thread.
                if count >= PATIENCE and self._waiting and worker.is_alive():
                    self._hung = f"data worker {worker.pid} gave no sign of life for {count * LOOK:g} s{_where(worker)}"
                    worker.kill()


class _Worker(ForkProcess):
    """A worker that has settled before the loader's own code begins, in which it might hang."""

    settle: Callable[[], None]

    def run(self) -> None:
        """Do the loader's work."""
        self.settle()
        super().run()


def _settle(parent: int, beats: mmap, place: int, bound: bool) -> None:
    """Leave signals to the training process, ``parent``: Slurm sends them to every process of a job, workers included.

    The loader itself ends workers with SIGTERM when they hang, so that one is obeyed if it comes from the parent. A
    worker whose parent was killed ends within a second: by itself it might wait for ever to hand over its last batch.
    With ``bound`` the kernel ends it, deaf or not, with the thread that forked it.
    """
    if bound and _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()  # what was inherited stays: looking through it costs time, and copies its pages
    signal.set_wakeup_fd(-1)  # inherited with the training process's signals
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def live() -> None:
        while getppid() == parent:
            beats[place] = (beats[place] + 1) % 256
            received = signal.sigtimedwait({signal.SIGTERM}, BEAT)
            if received is not None and received.si_pid == parent:
                break
        kill(getpid(), signal.SIGKILL)

    threading.Thread(target=live, name="life", daemon=True).start()


def _where(worker: _Worker) -> str:
    """Return what the kernel says of where a process is: its state and what it waits in; may be empty."""
    found = []
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        found.append(next(line.split("\t")[1] for line in status if line.startswith("State:")))
        found.append(Path(f"/proc/{worker.pid}/wchan").read_text().strip("0"))
    return "".join(f", {words}" for words in found if words)
