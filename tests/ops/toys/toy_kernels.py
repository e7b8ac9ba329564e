"""Kernels that keep, or break, what the compile table promises: it must see the difference."""

import torch
import triton
import triton.language as tl

from seqpar.ops import launch


@triton.jit
def matmul_kernel(a, b, c, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    rows, dims, columns = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, COLUMNS)
    left = tl.load(a + tl.program_id(0) * ROWS * DIM + rows[:, None] * DIM + dims)
    right = tl.load(b + dims[:, None] * COLUMNS + columns)
    out = tl.dot(left, right, input_precision=PRECISION)
    tl.store(c + tl.program_id(0) * ROWS * COLUMNS + rows[:, None] * COLUMNS + columns, out)


@triton.jit
def add_kernel(a, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(a + at, tl.load(a + at, mask=at < n) + 1.0, mask=at < n)


def matmul(a, b, warps=4, precision="ieee"):
    """``a`` [m, d] times ``b`` [d, n], in tiles of 64 rows."""
    c = torch.empty(a.shape[0], b.shape[1])
    rows = min(64, a.shape[0])
    constants = {"ROWS": rows, "DIM": a.shape[1], "COLUMNS": b.shape[1], "PRECISION": precision, "num_warps": warps}
    launch.launch(matmul_kernel, (a.shape[0] // rows,), a, b, c, **constants)
    return c


def add(a):
    """One more than ``a`` everywhere, in place."""
    launch.launch(add_kernel, (triton.cdiv(a.numel(), 256),), a, a.numel(), SIZE=256)
    return a
