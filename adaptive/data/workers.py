"""Loader processes: how they end, and how their death is told."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from os import getpid, getppid, kill
from typing import Any

from adaptive.errors import MachineError


def next_item(iterator: Iterator[Any]) -> Any:
    """Return the loader's next item, None at the end (raises MachineError when a worker died)."""
    try:
        return next(iterator, None)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "DataLoader worker (pid" not in str(error):
            raise
        raise _died(str(error).splitlines()[0]) from None
    except (EOFError, ConnectionError) as error:  # it died while it handed over a batch
        raise _died(type(error).__name__) from None


def _died(reason: str) -> MachineError:
    return MachineError(
        f"a data worker died ({reason}): usually out of memory or of /dev/shm; lower data.workers or train.micro_batch"
    )


def without_room(error: RuntimeError) -> MachineError:
    """Return what to say of torch's refusal of shared memory for a batch (raises ``error`` where it is another)."""
    if "shared memory" not in str(error):
        raise error
    return MachineError(
        f"no room in /dev/shm for a batch ({str(error).splitlines()[0]}); lower data.workers or train.micro_batch, or "
        "give it more (docker run --shm-size)"
    )


def settle_worker(parent: int, _: int) -> None:
    """Leave signals to the training process, ``parent``: Slurm sends them to every process of a job, workers included.

    The loader itself ends workers with SIGTERM when they hang, so that one is obeyed if it comes from the parent. A
    worker whose parent was killed ends within a second: by itself it might wait for ever to hand over its last batch.
    """
    gc.freeze()  # what was inherited stays: looking through it costs time, and copies its pages
    signal.set_wakeup_fd(-1)  # inherited with the training process's signals
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey_parent() -> None:
        while getppid() == parent:
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == parent:
                break
        kill(getpid(), signal.SIGKILL)

    threading.Thread(target=obey_parent, name="terminate", daemon=True).start()
