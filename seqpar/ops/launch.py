"""How a kernel is started: the one door through which every Triton launch goes.

Kernels import Triton, this file does not. The harness that compiles all kernels without a GPU stands in this door: it
replaces :func:`launch` to see what would be started, and :func:`architecture` to see it for another device.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ONE_AT_A_TIME = threading.Lock()  # the interpreter keeps the program's place in one variable for all threads


def interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` when it was imported)."""
    return type(kernel).__name__ == "InterpretedFunction"


def architecture(x: Tensor) -> str:
    """What a tile table is looked up by: ``"sm_90"``, ``"gfx942"``, ..., or ``"cpu"`` for the interpreter."""
    if not x.is_cuda:
        return "cpu"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(x.device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def launch(kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
    """Start ``kernel`` over ``grid`` on the device of its first tensor; ``options`` are constants, warps and stages."""
    if any(size == 0 for size in grid):
        return
    if interpreted(kernel):
        with _ONE_AT_A_TIME:
            kernel[tuple(grid)](*args, **options)
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.cuda.device(device):
        kernel[tuple(grid)](*args, **options)
