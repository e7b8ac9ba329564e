"""The gradients of a softmax block in Triton: one kernel for queries, one for keys and values, no atomics.

Both compute the weights again from the log-sum-exp of the whole softmax. A program owns what it writes, so that the
same inputs give the same bits: a tile of queries of one head, or a tile of keys with all query heads that share them.
The gradient of a score is ``weight * (d_weight - delta)`` with ``delta = d_out . out - d_lse``; the kernel for queries
runs first and leaves ``delta`` for the other. (Dao, 2023, "FlashAttention-2".)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.softmax_block.kernel import (
    _NUMBERS,
    LOG2_E,
    NOTHING,
    cell_strides,
    constants_of,
    load_rows,
    pairs_of,
    rows_of,
    scores_of,
    seen_pairs,
    store_rows,
    visited_run,
    weigh,
)
from seqpar.ops.softmax_block.reference import Mask
from seqpar.ops.softmax_block.tiles import tiles


@triton.jit
def load_sums(base, rows, count, heads):
    """The log-sum-exp of rows as a base-2 logarithm; +inf, which leaves no weight, beyond the last row."""
    return tl.load(base + rows.to(tl.int64) * heads, mask=rows < count, other=float("inf")) * LOG2_E


# ------------------------------------------------------------------------------------------------------------- queries


@triton.jit
def visit_keys_again(
    dq, q, grad, delta, sums, k, v, rows, begin, end, whole, gap, n, m, low, high, scale, k_t, v_t,
    mask, mask_t, mask_s,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, KEYS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """Add what the keys from ``begin`` to ``end``, but for a gap, give the gradient of the queries (unscaled)."""
    for at in range(begin, end, KEYS):
        start = at if ALL_SEEN else tl.where(at < whole, at, at + gap)
        keys = start + tl.arange(0, KEYS)
        key = load_rows(k, start, m, k_t, KEYS, K_WIDTH, ALL_SEEN)
        weights = scores_of(q, key, PRECISION) * scale - sums[:, None]
        value = load_rows(v, start, m, v_t, KEYS, V_WIDTH, ALL_SEEN)
        if not ALL_SEEN:
            seen = seen_pairs(rows[:, None], keys[None, :], n, m, low, high, mask, mask_t, mask_s, HAS_MASK)
            weights = tl.where(seen, weights, NOTHING)
        d_scores = tl.exp2(weights) * (scores_of(grad, value, PRECISION) - delta[:, None])
        dq = weigh(d_scores, key, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=_NUMBERS)
def queries_kernel(
    q, k, v, out, d_out, lse, d_lse, dq, delta, mask, n, m, low, high, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, out_b, out_t, out_h, d_out_b, d_out_t, d_out_h, mask_t, mask_s,
    GROUP: tl.constexpr, K_DIM: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_D_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq`` and ``delta`` of a tile of queries of one head."""
    head, batch, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    query = load_rows(q + batch * q_b + head * q_h, first_row, n, q_t, ROWS, K_WIDTH, False)
    grad = load_rows(d_out + batch * d_out_b + head * d_out_h, first_row, n, d_out_t, ROWS, V_WIDTH, False)
    grad = grad.to(q.dtype.element_ty)
    whole_out = load_rows(out + batch * out_b + head * out_h, first_row, n, out_t, ROWS, V_WIDTH, False)
    shift = tl.sum(grad.to(tl.float32) * whole_out.to(tl.float32), 1)
    place = batch * n * heads + head
    cells = rows.to(tl.int64) * heads
    if HAS_D_LSE:
        shift -= tl.load(d_lse + place + cells, mask=rows < n, other=0.0)
    tl.store(delta + place + cells, shift, mask=rows < n)
    sums = load_sums(lse + place, rows, n, heads)
    k += batch * k_b + (head // GROUP) * k_h
    v += batch * v_b + (head // GROUP) * v_h
    total = tl.zeros([ROWS, K_WIDTH], tl.float32)
    first, whole, gap, stop = visited_run(first_row, ROWS, n, m, low, high, KEYS, HAS_MASK)
    for all_seen in tl.static_range(2):
        begin, end = first, stop - gap
        if all_seen:
            begin, end = whole, whole + gap
        total = visit_keys_again(
            total, query, grad, shift, sums, k, v, rows, begin, end, whole, gap, n, m, low, high, scale * LOG2_E,
            k_t, v_t, mask, mask_t, mask_s, K_WIDTH, V_WIDTH, KEYS, HAS_MASK, PRECISION, all_seen == 1,
        )  # fmt: skip
    store_rows(dq + place * K_DIM, total * scale, first_row, n, heads * K_DIM, ROWS, K_DIM, K_WIDTH)


# ----------------------------------------------------------------------------------------------------- keys and values


@triton.jit
def visit_queries(
    dk, dv, k, v, q, d_out, lse, delta, keys, begin, end, whole, gap, n, m, low, high, scale, heads, q_t, d_out_t,
    mask, mask_t, mask_s,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """Add what one head's queries from ``begin`` to ``end``, but for a gap, give keys (unscaled) and values."""
    for at in range(begin, end, ROWS):
        start = at if ALL_SEEN else tl.where(at < whole, at, at + gap)
        rows = start + tl.arange(0, ROWS)
        query = load_rows(q, start, n, q_t, ROWS, K_WIDTH, ALL_SEEN)
        sums = load_sums(lse, rows, n, heads)
        weights = scores_of(k, query, PRECISION) * scale - sums[None, :]
        if not ALL_SEEN:
            seen = seen_pairs(rows[None, :], keys[:, None], n, m, low, high, mask, mask_t, mask_s, HAS_MASK)
            weights = tl.where(seen, weights, NOTHING)
        weights = tl.exp2(weights)
        grad = load_rows(d_out, start, n, d_out_t, ROWS, V_WIDTH, ALL_SEEN).to(k.dtype)
        dv = weigh(weights, grad, dv, PRECISION)
        shift = tl.load(delta + rows.to(tl.int64) * heads, mask=rows < n, other=0.0)
        dk = weigh(weights * (scores_of(v, grad, PRECISION) - shift[None, :]), query, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_NUMBERS)
def keys_kernel(
    q, k, v, d_out, lse, delta, dk, dv, mask, n, m, low, high, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_out_b, d_out_t, d_out_h, mask_t, mask_s,
    GROUP: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` of a tile of keys of one key/value head, summed over the query heads that share it."""
    shared, batch, key_heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    heads = key_heads * GROUP
    first_key = tl.program_id(0) * KEYS
    keys = first_key + tl.arange(0, KEYS)
    key = load_rows(k + batch * k_b + shared * k_h, first_key, m, k_t, KEYS, K_WIDTH, False)
    value = load_rows(v + batch * v_b + shared * v_h, first_key, m, v_t, KEYS, V_WIDTH, False)
    dk_total = tl.zeros([KEYS, K_WIDTH], tl.float32)
    dv_total = tl.zeros([KEYS, V_WIDTH], tl.float32)
    # Seen from a key, the band is its mirror image.
    first, whole, gap, stop = visited_run(first_key, KEYS, m, n, -high, -low, ROWS, HAS_MASK)
    for all_seen in tl.static_range(2):
        begin, end = first, stop - gap
        if all_seen:
            begin, end = whole, whole + gap
        for member in range(GROUP):  # within the parts: fewer addresses stay in registers
            head = shared * GROUP + member
            place = batch * n * heads + head
            dk_total, dv_total = visit_queries(
                dk_total, dv_total, key, value, q + batch * q_b + head * q_h, d_out + batch * d_out_b + head * d_out_h,
                lse + place, delta + place, keys, begin, end, whole, gap, n, m, low, high, scale * LOG2_E, heads,
                q_t, d_out_t, mask, mask_t, mask_s, K_WIDTH, V_WIDTH, ROWS, HAS_MASK, PRECISION,
                all_seen == 1,
            )  # fmt: skip
    place = batch * m * key_heads + shared
    store_rows(dk + place * K_DIM, dk_total * scale, first_key, m, key_heads * K_DIM, KEYS, K_DIM, K_WIDTH)
    store_rows(dv + place * V_DIM, dv_total, first_key, m, key_heads * V_DIM, KEYS, V_DIM, V_WIDTH)


# ---------------------------------------------------------------------------------------------------------------- both


def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    d_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients; see :func:`seqpar.ops.softmax_block.attend_backward`."""
    constants = constants_of(q, k, v, mask)
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    q, k = (rows_of(x, constants["K_WIDTH"]) for x in (q, k))
    v, out, d_out = (rows_of(x, constants["V_WIDTH"]) for x in (v, out, d_out))
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    rows = tiles(launch.architecture(q), q.element_size(), max(q.shape[3], v.shape[3]))
    cells, *pairs = pairs_of(mask, q, k)
    numbers = (*pairs, float(scale))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    tile = rows.queries
    launch.launch(
        queries_kernel, (-(-q.shape[1] // tile.own), q.shape[2], q.shape[0]),
        q, k, v, out, d_out, lse, lse if d_lse is None else d_lse.contiguous(), dq, delta, cells, *numbers, *strides,
        *out.stride()[:3], *d_out.stride()[:3], *cell_strides(mask), **constants, K_DIM=dq.shape[3],
        HAS_D_LSE=d_lse is not None,
        ROWS=tile.own, KEYS=tile.visited, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = rows.keys
    launch.launch(
        keys_kernel, (-(-k.shape[1] // tile.own), k.shape[2], q.shape[0]),
        q, k, v, d_out, lse, delta, dk, dv, cells, *numbers, *strides, *d_out.stride()[:3], *cell_strides(mask),
        **constants, K_DIM=dk.shape[3], V_DIM=dv.shape[3], KEYS=tile.own, ROWS=tile.visited,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dq, dk, dv
