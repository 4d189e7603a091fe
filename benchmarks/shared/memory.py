"""Peak memory of a training step: weights, gradients, optimizer state, activations and temporary tensors.

On CUDA it is the allocator's own peak. On the CPU every allocation and release of torch's allocator is taken from the
profiler's trace and summed: that is the same figure, exact to the byte and the same in every run. The growth of the
process's resident memory is not: it holds what malloc keeps back for later, and depends on what ran before.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "benchmark: measured step"
WARMUP = 2  # the optimizer's state appears in the first step


def peak_bytes(build: Callable[[], Any], device: str) -> int:
    """Build a trainee, train, and return the peak of the bytes that it added; nothing of it is left behind.

    Args:
        build: makes a function that does a training step, and that has ``close()``.
        device: cpu or cuda.
    """
    gc.collect()
    return _peak_on_cuda(build) if device == "cuda" else _peak_on_cpu(build)


def _peak_on_cuda(build: Callable[[], Any]) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build()
    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    step.close()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(build: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build()
        for _ in range(WARMUP):
            step()
        with record_function(MEASURED):
            step()
    step.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _peak_of_trace(events)


def _peak_of_trace(events: list[dict[str, Any]]) -> int:
    """Sum the allocations in the order of time; the peak counts inside the measured step only."""
    marks = [event for event in events if event.get("name") == MEASURED and event.get("ph") == "X"]
    start, end = marks[0]["ts"], marks[0]["ts"] + marks[0]["dur"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        if start <= event["ts"] <= end:
            peak = max(peak, held)
    return peak
