"""Seconds on a device, what that device can do at most, and what it is."""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from statistics import median
from typing import Any

import torch

from bench.ops.roofline import Card
from seqpar.ops.choice import triton_version

WARM_UP, FEWEST, LONG_SECONDS = 3, 5, 1.0
Step = Callable[[], Any]


def seconds_of(step: Step, device: torch.device) -> float:
    """Seconds of one step on the device, by CUDA events; by the clock on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def medians(steps: dict[str, Step], device: torch.device, rounds: int) -> dict[str, float | str]:
    """The median seconds of each step, round after round, so that a slow minute touches all alike.

    Of a step that fails, its error. What is slow runs ``FEWEST`` rounds.
    """
    found: dict[str, float | str] = {}
    for name, step in steps.items():
        try:
            spent = seconds_of(step, device)
            for _ in range(WARM_UP - 1 if rounds > 1 and spent < LONG_SECONDS else 0):
                step()
        except Exception as error:  # out of memory, or what a peer cannot do
            found[name] = f"{type(error).__name__}: {str(error)[:120]}"
    living = {name: step for name, step in steps.items() if name not in found}
    times: dict[str, list[float]] = {name: [] for name in living}
    for _ in range(rounds):
        for name, step in living.items():
            if len(times[name]) < FEWEST or sum(times[name]) < LONG_SECONDS:
                times[name].append(seconds_of(step, device))
    return found | {name: median(seconds) for name, seconds in times.items()}


def ceilings(device: torch.device, *, small: bool) -> Card:
    """Bytes per second of a copy (read and written), and flops per second of a bf16 matrix product, as measured."""
    bytes_, size = (1 << 20, 128) if small else (1 << 30, 8192)
    source = torch.ones(bytes_, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    steps: dict[str, Step] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    found = medians(steps, device, 1 if small else 20)
    return Card("this device", 2 * bytes_ / float(found["copy"]), 2 * size**3 / float(found["product"]))


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, driver and versions, and when."""
    facts: dict[str, Any] = {
        "taken": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton_version() or None,
        "flash-linear-attention": _version("flash-linear-attention") or _version("fla-core"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": None,
        "device": f"{platform.machine()} CPU",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "memory_bytes": properties.total_memory, "driver": _driver()}
    return facts


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() or None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
