"""Decayed linear attention as Triton kernels: gates summed up, states chained over chunks, outputs.

A chunk is C tokens of one batch and head; ``rows`` are its tokens in the order of memory. The scan reads them in that
order or, if ``REVERSE``, from the last to the first; what follows is meant in the order of the scan. ``into`` is the
decay from the state that enters the chunk to a token, ``out`` that from a token to the leaving state. A segment is a
stretch of tokens that no state crosses: a document starts, or a gate is zero, at its first token. Segments are counted
from 0 in each chunk, so a token sees the entering state if its segment is 0, and reaches the leaving one if its segment
is the last.

Gates that all key channels share (``SHARED``) come summed up from :func:`gate_sums_kernel`: the sums of a chunk, in two
parts, ``high`` in steps of 1/256 and ``low``. Differences of high parts are exact, so a difference of two sums is as
precise as its own size allows. ``into`` and ``out`` follow them, made in fp64, with zeros where segments end. Gates per
key channel (``VECTOR``) are summed in the direction in which they are needed.
"""

import triton
import triton.language as tl

ZERO_DECAY = tl.constexpr(-1000.0)  # the exponential of gates from here down is zero in every dtype
NEVER = tl.constexpr(float("-inf"))
WIDEN = tl.constexpr(
    bool(triton.knobs.runtime.interpret)
)  # the interpreter multiplies the bits of bf16, and cuts them off


@triton.jit
def base_of(x, b, h, row, stride_b, stride_t, stride_h):
    """Pointer to ``x[b, row, h, 0]``."""
    return x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row.to(tl.int64) * stride_t


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """``x`` in ``dtype``, rounded to the nearest number, in the interpreter too."""
    if WIDEN and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_tile(base, stride, rows, columns, num_rows, num_columns):
    """Tile [rows, columns]; zero outside."""
    inside = ((rows >= 0) & (rows < num_rows))[:, None] & (columns < num_columns)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, stride, rows, columns, num_rows, num_columns, x):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], narrow(x, base.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32 (fp64) sums; PRECISION is that of products of fp32 operands."""
    if WIDEN:
        a, b = a.to(acc.dtype), b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def state_product(a, state, acc, PRECISION: tl.constexpr):
    """``acc + a @ state``, rounded to the dtype of ``a``; for fp16 to TF32, which has as many bits and no overflow."""
    if a.dtype == tl.float16:
        return tl.dot(a.to(tl.float32), state.to(tl.float32), acc, input_precision="tf32", out_dtype=acc.dtype)
    return product(a, narrow(state, a.dtype), acc, PRECISION)


@triton.jit
def last_segment(segments, C: tl.constexpr, REVERSE: tl.constexpr):
    return tl.load(segments + (0 if REVERSE else C - 1))


@triton.jit
def row_factor(
    sums, half, segments, C: tl.constexpr, dtype: tl.constexpr, OUT: tl.constexpr,
    SHARED: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """[C]: ``out`` or ``into`` as far as shared gates and segments make it."""
    rows = tl.arange(0, C)
    if SHARED:
        return tl.load(sums + (3 if OUT else 2) * half + rows)
    factor = tl.full([C], 1.0, dtype)
    if SEGMENTED:
        segment = tl.load(segments + rows)
        seen = last_segment(segments, C, REVERSE) if OUT else 0
        factor = tl.where(segment == seen, factor, 0.0)
    return factor


@triton.jit
def channel_factor(
    gates, stride, columns, num_rows, C: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr,
    OUT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """[C, channels]: ``out`` or ``into`` of gates per channel. A token's own gate is in its ``into`` only."""
    shift = (-1 if REVERSE else 1) if OUT else 0
    tile = load_tile(gates, stride, tl.arange(0, C) + shift, columns, min(num_rows, C), K).to(dtype)
    return tl.exp(tl.cumsum(tile, 0, reverse=REVERSE != OUT))


@triton.jit
def pair_factor(
    sums, half, segments, C: tl.constexpr, dtype: tl.constexpr, TRANSPOSED: tl.constexpr, STRICT: tl.constexpr,
    SHARED: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """[C, C]: decay from the column's token to the row's (``TRANSPOSED``: from row to column), zero for later ones."""
    rows = tl.arange(0, C)
    if STRICT:
        seen = rows[:, None] > rows[None, :] if TRANSPOSED == REVERSE else rows[:, None] < rows[None, :]
    else:
        seen = rows[:, None] >= rows[None, :] if TRANSPOSED == REVERSE else rows[:, None] <= rows[None, :]
    if SEGMENTED:
        segment = tl.load(segments + rows)
        seen &= segment[:, None] == segment[None, :]
    if SHARED:
        high, low = tl.load(sums + rows), tl.load(sums + half + rows)
        if TRANSPOSED:
            high, low = -high, -low
        gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        return tl.exp(tl.where(seen, gap, NEVER))
    return tl.where(seen, 1.0, 0.0).to(dtype)


@triton.jit
def chunk_factor(
    gates, stride, sums, half, segments, columns, num_rows, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    dtype: tl.constexpr, SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """[BK] twice: the sums of gates per channel of a chunk, and what the entering state is multiplied with."""
    total = tl.zeros([BK], dtype)
    if SHARED:  # the decay from the entering state to the last token
        factor = tl.load(sums + 2 * half + (0 if REVERSE else C - 1)) + total
        return total, factor
    if VECTOR:
        total = tl.sum(load_tile(gates, stride, tl.arange(0, C), columns, num_rows, K).to(dtype), 0)
    factor = tl.exp(total)
    if SEGMENTED:
        factor = tl.where(last_segment(segments, C, REVERSE) == 0, factor, 0.0)
    return total, factor


@triton.jit
def gate_sums_kernel(
    gates, starts, sums, segments, totals, gates_b, gates_t, gates_h, tokens, num_chunks, heads, half,
    C: tl.constexpr, BH: tl.constexpr, STARTS: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums of shared gates in each chunk up to each token, segments, and totals; ``starts`` [t] flags documents."""
    num_blocks = (heads + BH - 1) // BH
    head_block, n = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks % num_chunks
    b = tl.program_id(0) // num_blocks // num_chunks
    rows, h = tl.arange(0, C), head_block * BH + tl.arange(0, BH)
    inside = (n * C + rows < tokens)[:, None] & (h < heads)[None, :]
    base = base_of(gates, b, n * 0, n * C, gates_b, gates_t, gates_h)
    gate = tl.load(base + rows[:, None] * gates_t + h[None, :] * gates_h, mask=inside, other=0.0).to(tl.float64)
    breaks = gate <= ZERO_DECAY
    total = tl.sum(gate, 0)
    sums_here = tl.cumsum(tl.where(breaks, 0.0, gate), 0, reverse=REVERSE)
    if SPLIT:
        high = tl.floor(sums_here * 256) / 256
        low = sums_here - high
    else:
        high, low = sums_here, sums_here * 0
    segment = breaks.to(tl.int32)
    if STARTS:
        segment += tl.load(starts + n * C + rows, mask=n * C + rows < tokens, other=0)[:, None]
    segment = tl.cumsum(segment, 0, reverse=REVERSE)
    into = tl.where(segment == 0, tl.exp(sums_here), 0.0)
    remaining = tl.sum(tl.where(breaks, 0.0, gate), 0)[None, :] - sums_here
    out = tl.where(segment == tl.max(segment, 0)[None, :], tl.exp(remaining), 0.0)
    at_chunk = (b.to(tl.int64) * heads + h) * num_chunks + n
    at = at_chunk[None, :] * C + rows[:, None]
    mask = (h < heads)[None, :]
    tl.store(sums + at, high.to(sums.dtype.element_ty), mask=mask)
    tl.store(sums + half + at, low.to(sums.dtype.element_ty), mask=mask)
    tl.store(sums + 2 * half + at, into.to(sums.dtype.element_ty), mask=mask)
    tl.store(sums + 3 * half + at, out.to(sums.dtype.element_ty), mask=mask)
    tl.store(segments + at, segment, mask=mask)
    tl.store(totals + at_chunk, total.to(totals.dtype.element_ty), mask=h < heads)


@triton.jit
def chain(
    pid, x, y, gates, sums, segments, initial, states, outgoing, passed, totals,
    x_b, x_t, x_h, y_b, y_t, y_h, gates_b, gates_t, gates_h, sums_b, sums_h, half, segments_b, segments_h,
    tokens, num_chunks, chunks_per_stretch, num_stretches, heads, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr, STORE: tl.constexpr, INITIAL: tl.constexpr, SUMMARY: tl.constexpr, TOTALS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the states of one stretch of chunks: ``S -> chunk factor * S + (x * factor)' y``.

    Forward x, y are k, v with ``out``; ``BACKWARD`` they are q, d_o with ``into``, against the order of the scan.
    ``states[n]`` is the state before chunk n, in the order of the chain. What is stored is multiplied by ``scale``,
    what is ``initial`` is not.
    """
    num_kb: tl.constexpr = (K + BK - 1) // BK
    num_vb: tl.constexpr = (V + BV - 1) // BV
    dtype: tl.constexpr = outgoing.dtype.element_ty
    kb, vb = pid % (num_kb * num_vb) // num_vb, pid % num_vb
    h = pid // (num_kb * num_vb) % heads
    stretch = pid // (num_kb * num_vb) // heads % num_stretches
    b = pid // (num_kb * num_vb) // heads // num_stretches
    rows, k, v = tl.arange(0, C), kb * BK + tl.arange(0, BK), vb * BV + tl.arange(0, BV)
    bh = (b * heads + h).to(tl.int64)
    at_stretch = bh * num_stretches + stretch
    acc = tl.zeros([BK, BV], dtype)
    if INITIAL:
        acc = load_tile(initial + at_stretch * K * V, V, k, v, K, V)
    through = tl.full([BK], 1.0, dtype)
    first = stretch * chunks_per_stretch
    for step in range(min(chunks_per_stretch, num_chunks - first)):
        n = first + step if REVERSE == BACKWARD else num_chunks - 1 - first - step
        num_rows = tokens - n * C
        if STORE:
            store_tile(states + (bh * num_chunks + n) * K * V, V, k, v, K, V, acc * scale)
        gates_n = base_of(gates, b, h, n * C, gates_b, gates_t, gates_h)
        sums_n = sums + b.to(tl.int64) * sums_b + h.to(tl.int64) * sums_h + n.to(tl.int64) * C
        segments_n = segments + b.to(tl.int64) * segments_b + h.to(tl.int64) * segments_h + n.to(tl.int64) * C
        x_tile = load_tile(base_of(x, b, h, n * C, x_b, x_t, x_h), x_t, rows, k, num_rows, K)
        y_tile = load_tile(base_of(y, b, h, n * C, y_b, y_t, y_h), y_t, rows, v, num_rows, V)
        if SHARED or VECTOR or SEGMENTED:
            factor = row_factor(sums_n, half, segments_n, C, dtype, not BACKWARD, SHARED, SEGMENTED, REVERSE)[:, None]
            if VECTOR:
                factor *= channel_factor(gates_n, gates_t, k, num_rows, C, K, dtype, not BACKWARD, REVERSE)
            x_tile = narrow(x_tile.to(dtype) * factor, x_tile.dtype)
            total, across = chunk_factor(
                gates_n, gates_t, sums_n, half, segments_n, k, num_rows, C, K, BK, dtype,
                SHARED, VECTOR, SEGMENTED, REVERSE,
            )  # fmt: skip
            acc *= across[:, None]
            through *= across
            if TOTALS and vb == 0:
                tl.store(totals + (bh * num_chunks + n) * K + k, total, mask=k < K)
        acc = product(tl.trans(x_tile), y_tile, acc, PRECISION)
    store_tile(outgoing + at_stretch * K * V, V, k, v, K, V, acc * scale)
    if SUMMARY and vb == 0:
        tl.store(passed + at_stretch * K + k, through, mask=k < K)


@triton.jit
def chain_kernel(
    x, y, gates, sums, segments, initial, states, outgoing, passed, totals,
    x_b, x_t, x_h, y_b, y_t, y_h, gates_b, gates_t, gates_h, sums_b, sums_h, half, segments_b, segments_h,
    tokens, num_chunks, chunks_per_stretch, num_stretches, heads, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr, STORE: tl.constexpr, INITIAL: tl.constexpr, SUMMARY: tl.constexpr, TOTALS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`chain` for each block, stretch, head and sequence."""
    chain(
        tl.program_id(0), x, y, gates, sums, segments, initial, states, outgoing, passed, totals,
        x_b, x_t, x_h, y_b, y_t, y_h, gates_b, gates_t, gates_h, sums_b, sums_h, half, segments_b, segments_h,
        tokens, num_chunks, chunks_per_stretch, num_stretches, heads, scale, K, V, C, BK, BV,
        SHARED, VECTOR, SEGMENTED, REVERSE, BACKWARD, STORE, INITIAL, SUMMARY, TOTALS, PRECISION,
    )  # fmt: skip


@triton.jit
def fold_kernel(
    ends, passed, initial, before, outgoing, num_stretches, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """States ``before`` each stretch, of what each adds, ``ends``, and what passes it; the last is outgoing."""
    num_vb: tl.constexpr = (V + BV - 1) // BV
    k, v = tl.program_id(0) // num_vb * BK + tl.arange(0, BK), tl.program_id(0) % num_vb * BV + tl.arange(0, BV)
    at = tl.program_id(1).to(tl.int64) * num_stretches
    acc = tl.zeros([BK, BV], outgoing.dtype.element_ty)
    if INITIAL:
        acc = load_tile(initial + tl.program_id(1).to(tl.int64) * K * V, V, k, v, K, V)
    for stretch in range(num_stretches):
        store_tile(before + (at + stretch) * K * V, V, k, v, K, V, acc)
        through = tl.load(passed + (at + stretch) * K + k, mask=k < K, other=0.0)
        acc = acc * through[:, None] + load_tile(ends + (at + stretch) * K * V, V, k, v, K, V)
    store_tile(outgoing + tl.program_id(1).to(tl.int64) * K * V, V, k, v, K, V, acc * scale)


@triton.jit
def output_kernel(
    x, y, z, gates, sums, segments, scores, states, boundary, reach, out,
    x_b, x_t, x_h, y_b, y_t, y_h, z_b, z_t, z_h, gates_b, gates_t, gates_h,
    sums_b, sums_h, half, segments_b, segments_h, reach_b, reach_h,
    tokens, num_chunks, heads, pair_scale, state_scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
    BACKWARD: tl.constexpr, BOUNDARY: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = pair_scale (x y' * decay) z + state_scale (x * factor) states`` for one chunk and block of value dims.

    Forward x, y, z are q, k, v and the factor is ``into``; ``BACKWARD`` they are k, q, d_o and it is ``out``, and the
    pairs are those of forward transposed. To the states is added what is left of ``boundary`` [b, h, k, v]: its
    part ``reach`` [b, h, n, 1 or k]. With gates per channel, ``scores`` [b, h, n, C, C] are given:
    rows are later tokens, columns earlier ones.
    """
    num_vb: tl.constexpr = (V + BV - 1) // BV
    dtype: tl.constexpr = boundary.dtype.element_ty
    pid = tl.program_id(0)
    vb, h, n = pid % num_vb, pid // num_vb % heads, pid // num_vb // heads % num_chunks
    b = pid // num_vb // heads // num_chunks
    rows, v, num_rows = tl.arange(0, C), vb * BV + tl.arange(0, BV), tokens - n * C
    bh = (b * heads + h).to(tl.int64)
    at_chunk = bh * num_chunks + n
    sums_n = sums + b.to(tl.int64) * sums_b + h.to(tl.int64) * sums_h + n.to(tl.int64) * C
    segments_n = segments + b.to(tl.int64) * segments_b + h.to(tl.int64) * segments_h + n.to(tl.int64) * C
    reach_n = reach + b.to(tl.int64) * reach_b + h.to(tl.int64) * reach_h
    x_n, y_n = base_of(x, b, h, n * C, x_b, x_t, x_h), base_of(y, b, h, n * C, y_b, y_t, y_h)
    acc, pairs = tl.zeros([C, BV], dtype), tl.zeros([C, C], dtype)
    for kb in range((K + BK - 1) // BK):
        k = kb * BK + tl.arange(0, BK)
        x_tile = load_tile(x_n, x_t, rows, k, num_rows, K)
        if VECTOR:
            gates_n = base_of(gates, b, h, n * C, gates_b, gates_t, gates_h)
            factor = channel_factor(gates_n, gates_t, k, num_rows, C, K, dtype, BACKWARD, REVERSE)
            x_tile = narrow(x_tile.to(dtype) * factor, x_tile.dtype)
        else:
            y_tile = load_tile(y_n, y_t, rows, k, num_rows, K)
            pairs = product(x_tile, tl.trans(y_tile), pairs, PRECISION)
        acc = state_product(x_tile, load_tile(states + at_chunk * K * V, V, k, v, K, V), acc, PRECISION)
        if BOUNDARY:
            edge = load_tile(boundary + bh * K * V, V, k, v, K, V)
            if REACH:
                left = load_reach(reach_n, n, k, K, VECTOR)
                edge *= left[:, None]
            acc = state_product(x_tile, edge, acc, PRECISION)
    factor = row_factor(sums_n, half, segments_n, C, dtype, BACKWARD, SHARED, SEGMENTED, REVERSE)
    acc *= (factor * state_scale)[:, None]
    if VECTOR:
        pairs = load_scores(scores + at_chunk * C * C, C, BACKWARD != REVERSE).to(dtype)
    else:
        pairs *= pair_factor(sums_n, half, segments_n, C, dtype, BACKWARD, False, SHARED, SEGMENTED, REVERSE)
    z_tile = load_tile(base_of(z, b, h, n * C, z_b, z_t, z_h), z_t, rows, v, num_rows, V)
    acc = product(narrow(pairs * pair_scale, z_tile.dtype), z_tile, acc, PRECISION)
    out_n = out + ((b.to(tl.int64) * tokens + n * C) * heads + h) * V
    store_tile(out_n, heads * V, rows, v, num_rows, V, acc)


@triton.jit
def load_reach(reach, n, k, K: tl.constexpr, VECTOR: tl.constexpr):
    """What of a boundary state reaches chunk n, per channel or the same for all."""
    if VECTOR:
        return tl.load(reach + n.to(tl.int64) * K + k, mask=k < K, other=0.0)
    return tl.load(reach + n + k * 0)


@triton.jit
def load_scores(scores, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    rows = tl.arange(0, C)
    if TRANSPOSED:
        return tl.load(scores + rows[None, :] * C + rows[:, None])
    return tl.load(scores + rows[:, None] * C + rows[None, :])
