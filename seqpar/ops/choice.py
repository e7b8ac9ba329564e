"""Which implementation of an op runs: its reference (torch) or its kernels (Triton).

Law: whichever is chosen, the numbers are those of the reference, up to rounding. Triton 3.4 to 3.7.0 get some gated
backward kernels wrong on Hopper, without any error (https://github.com/fla-org/flash-linear-attention/issues/640).
There the kernels of an op are used only if they passed its self-check in this process: see ``selfcheck.py``.
"""

import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from seqpar.ops import launch

IMPLEMENTATIONS = ("auto", "reference", "triton")
DOUBTED_ON_HOPPER = (3, 4), (3, 7, 1)  # from the first that miscompiles up to, but without, the first that does not
LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.2}  # what is miscompiled is off by half

Check = Callable[[torch.device, torch.dtype], float]


@dataclass(frozen=True)
class Verdict:
    """Whether ``impl="auto"`` uses an op's kernels on a device, and why (not)."""

    used: bool
    why: str


def use_kernel(impl: str, x: Tensor, *, check: Check) -> bool:
    """Whether an op runs its kernels on tensors like ``x``.

    ``"reference"``: no. ``"triton"``: yes. ``"auto"``: on CUDA, in fp32, fp16 and bf16, where Triton is installed and
    its compiler is trusted on that device or ``check(device, dtype)``, the op's largest relative error, is small.
    A check that fails warns once, and the reference runs.
    Raises ``ValueError`` for another ``impl``, and for ``"triton"`` where kernels cannot run.
    """
    check_impl(impl, x)
    return verdict(x, check).used if impl == "auto" else impl == "triton"


def check_impl(impl: str, x: Tensor) -> None:
    """Raise ``ValueError`` for an ``impl`` that does not exist, or that cannot run on tensors like ``x``.

    What sends messages calls this before the first one: the ops ask for themselves only when they begin.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "triton":
        _require_triton(x)


def verdict(x: Tensor, check: Check) -> Verdict:
    """What ``impl="auto"`` chooses for tensors like ``x``, and why."""
    if not x.is_cuda:
        return Verdict(False, "tensors are on the CPU")
    if not has_triton():
        return Verdict(False, "triton is not installed")
    if x.dtype not in LARGEST_ERROR:
        return Verdict(False, f"kernels do not compute in {x.dtype}")
    if trusted(launch.architecture(x)):
        return Verdict(True, f"triton {triton_version()} is trusted on this device")
    return _checked(check, x.device, x.dtype)


def trusted(architecture: str) -> bool:
    """Whether Triton's compiler is known to get every kernel right on that architecture."""
    first, fixed = DOUBTED_ON_HOPPER
    return architecture != "sm_90" or not first <= _numbers(triton_version()) < fixed


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; it is not imported here."""
    return importlib.util.find_spec("triton") is not None


def triton_version() -> str:
    """The version of the installed Triton, ``""`` without one."""
    for name in ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def kernels_are_interpreted() -> bool:
    """Whether kernels became interpreted functions, which run on CPU tensors, when they were imported."""
    if not has_triton():
        return False
    from seqpar.ops.decayed_linear_attention import kernel

    return any(launch.interpreted(value) for value in vars(kernel).values())


def _require_triton(x: Tensor) -> None:
    if not has_triton():
        raise ValueError('impl="triton" needs triton, which is not installed: pip install "seqpar[kernels]"')
    if not x.is_cuda and not kernels_are_interpreted():
        raise ValueError(
            f'impl="triton" got tensors on {x.device}: Triton kernels need a CUDA device or Triton\'s interpreter; '
            'move the tensors, or use impl="auto"'
        )


@cache
def _checked(check: Check, device: torch.device, dtype: torch.dtype) -> Verdict:
    """One self-check per op, device and dtype: it takes seconds, and its answer does not change."""
    try:
        error = check(device, dtype)
        passed, found = error <= LARGEST_ERROR[dtype], f"relative error {error:.1e}"  # NaN does not pass
    except Exception as problem:  # a compiler that fails says so in its own ways
        passed, found = False, f"{type(problem).__name__}: {problem}"
    where = f"self-check with triton {triton_version()} on {device} in {str(dtype).removeprefix('torch.')}"
    if passed:
        return Verdict(True, f"{where} passed, {found}")
    warnings.warn(f"{where} failed, {found}: the reference runs; triton >= 3.7.1 is known to be right", stacklevel=4)
    return Verdict(False, f"{where} failed, {found}")


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 7, 1) of ``"3.7.1+git0a1b"``; a version without a number is taken for a doubted one."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(number or 0) for number in found.groups()) if found else DOUBTED_ON_HOPPER[0]
