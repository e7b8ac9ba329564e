"""Compile kernels ahead of time and read, from the binaries, what their authors promised."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from bench.ops.kernels_record import TARGETS, Job

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes of a block (work group)
HALF = ("f16", "bf16")
# rows and element type of the left matrix, and the layout of the result, which is "blocked" where threads multiply
DOT = r"(?:tt\.dot|ttng\.warp_group_dot)\s.*:\s*(?:tensor|!ttg\.memdesc)<(\d+)x\d+x(\w+),.*->.*,\s*#(\w+)>"
WGMMA_ROWS = 64  # fewer rows of a tile cannot use the matrix units of a whole warp group


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel needs and contains.

    ``spill_bytes`` is memory of its own per thread. ``half_dots`` multiply 16-bit matrices, ``off_matrix_units`` of
    them with ordinary multiplications; ``large_dots`` of them have tiles that a warp group could multiply at once.
    ``tensor_bytes`` are those of all tensors that it is given, at the shapes of the case.
    """

    case: str
    kernel: str
    architecture: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: int
    warp_group_instructions: int
    dots: int
    half_dots: int
    off_matrix_units: int
    large_dots: int
    grid: tuple[int, ...]
    starts: int
    tensor_bytes: int
    error: str = ""

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        found = [f"does not compile: {self.error}"] if self.error else []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes per thread")
        if self.off_matrix_units:
            found.append(f"{self.off_matrix_units} of {self.half_dots} 16-bit dots are off the matrix units")
        if self.half_dots and not self.matrix_instructions:
            found.append("has 16-bit dots and no matrix instruction")
        if self.architecture == "sm_90" and self.large_dots and not self.warp_group_instructions:
            found.append(f"has {self.large_dots} dots of {WGMMA_ROWS} rows or more and no wgmma")
        if self.shared_bytes > SHARED_LIMIT[self.architecture]:
            limit = SHARED_LIMIT[self.architecture]
            found.append(f"needs {self.shared_bytes} bytes of shared memory, there are {limit}")
        return found


def examined(job: Job) -> Binary:
    """Compile one kernel, without a GPU; one that does not compile says why."""
    try:
        return compiled(job)
    except Exception as error:  # whatever the compilers raise, the other kernels are still worth a look
        why = error
        while why.__cause__ is not None:
            why = why.__cause__
        unknown = {field.name: 0 for field in fields(Binary) if field.type in (int, "int")}
        named: dict[str, Any] = {
            "case": job.case,
            "kernel": job.name,
            "architecture": job.architecture,
            "grid": job.grid,
        }
        return Binary(**{**unknown, **named, "error": f"{type(why).__name__}: {why}"})


def compiled(job: Job) -> Binary:
    """The same, but raises what the compilers raise."""
    source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    result = triton.compile(source, target=TARGETS[job.architecture], options=dict(job.options.__dict__))
    counted = _amd(result.asm["amdgcn"]) if job.architecture.startswith("gfx") else _nvidia(result.asm["cubin"])
    dots = Dots.of(result.asm["ttgir"])
    return Binary(
        case=job.case,
        kernel=job.name,
        architecture=job.architecture,
        warps=result.metadata.num_warps,
        stages=result.metadata.num_stages,
        shared_bytes=result.metadata.shared,
        dots=dots.all,
        half_dots=dots.half,
        off_matrix_units=dots.off_matrix_units,
        large_dots=dots.large if result.metadata.num_warps % 4 == 0 else 0,
        grid=job.grid,
        starts=job.starts,
        tensor_bytes=job.bytes_,
        **counted,
    )


@dataclass(frozen=True)
class Dots:
    """The matrix products of a kernel, counted in Triton's own GPU code."""

    all: int
    half: int
    off_matrix_units: int
    large: int

    @classmethod
    def of(cls, code: str) -> "Dots":
        found = [match.groups() for match in re.finditer(DOT, code)]
        half = [(int(rows), layout) for rows, dtype, layout in found if dtype in HALF]
        off = sum(layout.startswith("blocked") for _, layout in half)
        return cls(len(found), len(half), off, sum(rows >= WGMMA_ROWS for rows, _ in half))


@cache
def _program(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_program("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True).stdout
        done = subprocess.run([_program("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    local = len(re.findall(r"\b(?:LDL|STL)\b", done.stdout))
    warp_group = len(re.findall(r"\bHGMMA\b", done.stdout))
    return {
        "registers": numbers["REG"],
        # loads and stores of local memory are spills (or arrays with moving indices) even where no stack is counted
        "spill_bytes": numbers["STACK"] + numbers["LOCAL"] or 4 * local,
        "matrix_instructions": len(re.findall(r"\b[HID]MMA\b", done.stdout)) + warp_group,
        "warp_group_instructions": warp_group,
    }


def _amd(code: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return max((int(found) for found in re.findall(rf"\.{name}:\s+(\d+)", code)), default=0)

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": max(4 * number("vgpr_spill_count"), number("private_segment_fixed_size")),
        "matrix_instructions": len(re.findall(r"\bv_mfma_", code)),
        "warp_group_instructions": 0,
    }
