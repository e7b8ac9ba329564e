"""The softmax block in Triton: outputs stay fp32 until they are merged, and a band costs its area.

A program owns a tile of queries of one head and visits the keys they see. Tiles of keys that no query of the tile
sees are not visited; those that all of them see need no mask; the rest is masked by comparing offsets. Scores,
statistics and outputs are fp32. In 16 bits the weights enter their product as a sum of two numbers, or their rounding
alone would weigh as much as that of the final output.
(Dao, 2023, "FlashAttention-2"; Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax".)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from seqpar.ops import launch
from seqpar.ops.softmax_block.bands import Band
from seqpar.ops.softmax_block.reference import Mask
from seqpar.ops.softmax_block.tiles import LARGEST_TILE, tiles

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(float("-inf"))
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter multiplies the bits of bf16 as integers

_NUMBERS = ["n", "m", "low", "high", "scale"]  # one binary serves all of their values


# ------------------------------------------------------------------------------------------------- what kernels share


@triton.jit
def load_rows(base, start, count, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """[ROWS, WIDTH] of one head from row ``start``; 0 from row ``count`` on, of which there is none if ``WHOLE``."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=rows[:, None] < count - start, other=0.0)


@triton.jit
def store_rows(base, x, start, count, stride, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    rows, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    tl.store(pointers, x, mask=(rows[:, None] < count - start) & (dims[None, :] < DIM))


@triton.jit
def visited_run(start, length, own, count, low, high, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Which of ``count`` tokens a tile of mine visits, in steps: from; all seen from; how many are all seen; up to.

    The tile holds ``length`` of my ``own`` tokens from ``start``; token i sees j where low <= j - i <= high.
    """
    last = tl.minimum(start + length, own) - 1
    first = tl.minimum(tl.maximum(start + low, 0), count) // STEP * STEP
    stop = tl.maximum(tl.minimum(last + high + 1, count), first)
    if MASKED:
        whole, whole_stop = stop, stop
    else:
        whole = tl.minimum(tl.cdiv(tl.maximum(last + low, 0), STEP) * STEP, stop)
        whole = tl.where(start + length > own, stop, whole)  # rows beyond my tokens have nothing to be weighed by
        whole_stop = tl.maximum(tl.minimum(tl.maximum(start + high + 1, 0), count) // STEP * STEP, whole)
    return first, whole, whole_stop - whole, stop


@triton.jit
def seen_pairs(rows, keys, n, m, low, high, mask, mask_t, mask_s, HAS_MASK: tl.constexpr):
    """Whether each row sees each key; ``rows`` and ``keys`` are a column and a row, or the other way round."""
    offset = keys - rows
    inside = (rows < n) & (keys < m)
    seen = inside & (offset >= low) & (offset <= high)
    if HAS_MASK:
        cells = mask + rows.to(tl.int64) * mask_t + keys.to(tl.int64) * mask_s
        seen = seen & (tl.load(cells, mask=inside, other=0) != 0)
    return seen


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` with fp32 sums: matrix units in 16 bits, else fp32, whole or as three products of TF32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3" if PRECISION == "tf32x3" else "ieee")


@triton.jit
def scores_of(a, b, PRECISION: tl.constexpr):
    """``a @ b'`` in fp32."""
    return product(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), PRECISION)


@triton.jit
def weigh(weights, x, total, PRECISION: tl.constexpr):
    """``total + weights @ x`` with fp32 weights; "split" into two of the dtype of ``x``."""
    high = weights.to(x.dtype)
    total = product(high, x, total, PRECISION)
    if PRECISION == "split":
        total = product((weights - high.to(tl.float32)).to(x.dtype), x, total, PRECISION)
    return total


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def visit_keys(
    total, top, norm, q, k, v, rows, begin, end, whole, gap, n, m, low, high, scale, k_t, v_t, mask, mask_t, mask_s,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, KEYS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """Fold the keys from ``begin`` to ``end``, but for a gap, into each row's weighted sum, largest score and norm."""
    for at in range(begin, end, KEYS):
        start = at if ALL_SEEN else tl.where(at < whole, at, at + gap)
        keys = start + tl.arange(0, KEYS)
        key = load_rows(k, start, m, k_t, KEYS, K_WIDTH, ALL_SEEN)
        scores = scores_of(q, key, PRECISION) * scale
        if not ALL_SEEN:
            seen = seen_pairs(rows[:, None], keys[None, :], n, m, low, high, mask, mask_t, mask_s, HAS_MASK)
            scores = tl.where(seen, scores, NOTHING)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = new_top
        if not ALL_SEEN:
            shift = tl.where(new_top == NOTHING, 0.0, new_top)  # a row that has seen nothing yet
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        norm = norm * fade + tl.sum(weights, 1)
        value = load_rows(v, start, m, v_t, KEYS, V_WIDTH, ALL_SEEN)
        total = weigh(weights, value, total * fade[:, None], PRECISION)
        top = new_top
    return total, top, norm


@triton.jit(do_not_specialize=_NUMBERS)
def forward_kernel(
    q, k, v, out, lse, mask, n, m, low, high, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, mask_t, mask_s,
    GROUP: tl.constexpr, V_DIM: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries of one head; scores are base-2 logarithms."""
    head, batch, heads = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # under a causal mask the last rows work longest
    rows = first_row + tl.arange(0, ROWS)
    query = load_rows(q + batch * q_b + head.to(tl.int64) * q_h, first_row, n, q_t, ROWS, K_WIDTH, False)
    k += batch * k_b + (head // GROUP).to(tl.int64) * k_h
    v += batch * v_b + (head // GROUP).to(tl.int64) * v_h
    total = tl.zeros([ROWS, V_WIDTH], tl.float32)
    top = tl.full([ROWS], NOTHING, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    first, whole, gap, stop = visited_run(first_row, ROWS, n, m, low, high, KEYS, HAS_MASK)
    for all_seen in tl.static_range(2):
        begin, end = first, stop - gap
        if all_seen:
            begin, end = whole, whole + gap
        total, top, norm = visit_keys(
            total, top, norm, query, k, v, rows, begin, end, whole, gap, n, m, low, high, scale * LOG2_E, k_t, v_t,
            mask, mask_t, mask_s, K_WIDTH, V_WIDTH, KEYS, HAS_MASK, PRECISION, all_seen == 1,
        )  # fmt: skip
    nothing = norm == 0
    total = total / tl.where(nothing, 1.0, norm)[:, None]
    place = batch * n * heads + head
    store_rows(out + place * V_DIM, total, first_row, n, heads * V_DIM, ROWS, V_DIM, V_WIDTH)
    sums = tl.where(nothing, NOTHING, (top + tl.log2(tl.where(nothing, 1.0, norm))) * LN_2)
    tl.store(lse + place + rows.to(tl.int64) * heads, sums, mask=rows < n)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` over ``k``, ``v``, and its log-sum-exp; see :func:`seqpar.ops.softmax_block.attend`."""
    constants = constants_of(q, k, v, mask)
    v_dim = v.shape[3]
    q, k, v = (rows_of(x, constants[width]) for x, width in ((q, "K_WIDTH"), (k, "K_WIDTH"), (v, "V_WIDTH")))
    b, n, h, _ = q.shape
    out = torch.empty(b, n, h, v_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, n, h, dtype=torch.float32, device=q.device)
    tile = tiles(launch.architecture(q), q.element_size(), max(q.shape[3], v.shape[3])).forward
    cells, *numbers = pairs_of(mask, q, k)
    launch.launch(
        forward_kernel, (-(-n // tile.own), h, b), q, k, v, out, lse, cells, *numbers, float(scale),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cell_strides(mask), V_DIM=v_dim, **constants,
        ROWS=tile.own, KEYS=tile.visited, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def rows_of(x: Tensor, width: int) -> Tensor:
    """``x`` with its last dim contiguous and filled up with zeros, and offsets within a tile that fit 32 bits.

    Filled up, rows load as whole vectors: masks over dims would cost more registers than there are.
    """
    if x.shape[3] < width:
        return functional.pad(x, (0, width - x.shape[3]))
    return x if x.stride(3) == 1 and x.stride(1) * LARGEST_TILE < 2**31 else x.contiguous()


def pairs_of(mask: Mask, q: Tensor, k: Tensor) -> tuple[Tensor, int, int, int, int]:
    """Mask cells (``q`` where there are none), n, m and the band, kept within the block so that it fits 32 bits."""
    n, m = q.shape[1], k.shape[1]
    band = mask if isinstance(mask, Band) else Band()
    low = -n if band.low is None else min(max(band.low, -n), m)
    high = m if band.high is None else min(max(band.high, -n), m)
    return (q if isinstance(mask, Band) else mask.view(torch.uint8)), n, m, low, high


def cell_strides(mask: Mask) -> tuple[int, int]:
    return (0, 0) if isinstance(mask, Band) else (mask.stride(0), mask.stride(1))


def precision_of(architecture: str, bytes_: int) -> str:
    """How products are made exact: 16 bits "split" weights in two. NVIDIA's matrix units take fp32 as the sum of two
    TF32 numbers, which loses the last two bits of a product, and needs no more registers than there are."""
    if bytes_ == 2:
        return "split"
    return "tf32x3" if architecture.startswith("sm_") else "ieee"


def constants_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> dict[str, Any]:
    """What is compiled into a binary besides its tiles."""
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "K_WIDTH": max(16, triton.next_power_of_2(q.shape[3])),
        "V_WIDTH": max(16, triton.next_power_of_2(v.shape[3])),
        "HAS_MASK": not isinstance(mask, Band),
        "PRECISION": precision_of(launch.architecture(q), q.element_size()),
    }
