"""Checks of the GPUs: driver, torch's build, a computation on each, other processes on them, NCCL."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import psutil

from adaptive.doctor.checks.network import reduce_here
from adaptive.doctor.checks.software import PROBE_SECONDS, torch_facts
from adaptive.doctor.finding import Check, CheckSettings, Finding, error, ok, skipped, warning
from adaptive.doctor.programs import run_program
from adaptive.doctor.torch_versions import install_command

GIB = 2**30


def has_gpu() -> bool:
    """Say whether the kernel shows an NVIDIA GPU, however torch was built."""
    return Path("/proc/driver/nvidia/version").exists()


def driver() -> str:
    """Return the driver's version, or an empty string."""
    if shutil.which("nvidia-smi") is None:
        return ""
    ended = run_program(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 15)
    return ended.out.split()[0] if ended.code == 0 and ended.out.split() else ""


def cuda(_: CheckSettings) -> Finding:
    """Check driver, torch's CUDA, capability, free memory, and a product of matrices on every GPU."""
    if not has_gpu():
        return skipped("no NVIDIA GPU here; training runs on CPUs")
    facts, version = torch_facts(), driver()
    if "error" in facts:
        return error(f"torch does not start: {facts['error']}", install_command())
    if facts["cuda_build"] is None:
        return error(f"there is a GPU, but torch {facts['torch']} was built without CUDA", install_command())
    if "cuda_error" in facts:
        shown = f"driver {version or '(nvidia-smi does not answer)'}, torch's CUDA {facts['cuda_build']}"
        return error(f"{shown}: {facts['cuda_error']}", "nvidia-smi   # update a driver older than torch's CUDA")
    devices = facts["devices"]
    if not devices:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return error(f"torch sees no GPU (CUDA_VISIBLE_DEVICES={hidden})", "unset CUDA_VISIBLE_DEVICES")
    for number, device in enumerate(devices):
        capability = "".join(map(str, device["capability"]))
        built = facts["architectures"]
        # Machine code runs within a major version; what is kept as PTX (compute_) is translated for later ones.
        if not any(re.match(rf"compute_|sm_{device['capability'][0]}\da?$", name) for name in built):
            found = (
                f"GPU {number}, {device['name']}, has capability {capability}; torch was built for {', '.join(built)}"
            )
            return error(found, install_command())
        if device["error"]:
            return error(f"GPU {number}, {device['name']}: {device['error']}", f"nvidia-smi -q -i {number}")
    for number, device in enumerate(devices):
        if device["free"] < 0.8 * device["total"]:
            free, total = device["free"] / GIB, device["total"] / GIB
            return warning(f"GPU {number}: only {free:.0f} of {total:.0f} GiB are free", "nvidia-smi   # who uses it")
    memory = devices[0]["total"] / GIB
    shown = f"{len(devices)} x {devices[0]['name']} with {memory:.0f} GiB"
    return ok(f"{shown}, driver {version}, torch's CUDA {facts['cuda_build']}, {devices[0]['ms']:.2f} ms a product")


def gpu_processes(_: CheckSettings) -> Finding:
    """Look for this user's processes that hold GPU memory, perhaps left behind."""
    if not has_gpu() or shutil.which("nvidia-smi") is None:
        return skipped("no NVIDIA GPU here" if not has_gpu() else "nvidia-smi is not on PATH")
    ended = run_program(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], 15)
    if ended.code != 0:
        return warning(f"nvidia-smi: {ended.reason}", "nvidia-smi")
    mine = []
    for word in ended.out.split():
        try:
            process = psutil.Process(int(word))
            if process.uids().real == os.getuid():
                mine.append((process.pid, " ".join(process.cmdline())[:60]))
        except (psutil.Error, ValueError):
            continue  # another user's, another container's, or gone
    if mine:
        shown = "; ".join(f"{pid}: {command}" for pid, command in mine[:4])
        return warning(f"{len(mine)} of your processes hold GPUs: {shown}", f"kill {' '.join(str(p) for p, _ in mine)}")
    return ok("no other process of yours on the GPUs")


def nccl(_: CheckSettings) -> Finding:
    """Check that two processes with a GPU each can all_reduce over NCCL."""
    if not has_gpu():
        return skipped("no NVIDIA GPU here; ranks talk over gloo")
    facts = torch_facts()
    count = len(facts.get("devices", []))
    if count < 2:
        return skipped(f"NCCL {facts.get('nccl', 'unknown')}; {count} GPU: nothing to talk between")
    found = reduce_here("nccl")
    if "error" in found:
        return error(
            f"two GPUs cannot reduce over NCCL: {found['error']}", "NCCL_DEBUG=INFO adaptive doctor --only nccl"
        )
    return ok(f"NCCL {facts['nccl']}: 2 processes reduce 16 MiB at {found['bandwidth'] / 1e9:.1f} GB/s")


CHECKS = [
    Check("cuda", "gpu", cuda, slow=True, limit=PROBE_SECONDS + 20),
    Check("gpu-processes", "gpu", gpu_processes),
    Check("nccl", "gpu", nccl, slow=True, limit=2 * PROBE_SECONDS),
]
