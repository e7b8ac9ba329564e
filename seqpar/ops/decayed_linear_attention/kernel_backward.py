"""Gradients of q, k and the gates of decayed linear attention as Triton kernels; words as in ``kernel.py``.

The gradient of a gate is the sum over all that passes it, from a token before it to its own or a later one. Nothing is
subtracted that did not pass: pairs inside the chunk without the diagonal, what enters the chunk and reaches its token
or later ones, what leaves the chunk from earlier tokens, and what crosses the whole chunk.
"""

import triton
import triton.language as tl

from seqpar.ops.decayed_linear_attention.kernel import (
    base_of,
    channel_factor,
    chunk_factor,
    load_reach,
    load_tile,
    narrow,
    pair_factor,
    product,
    row_factor,
    state_product,
    store_tile,
)


@triton.jit
def pair_gradients_kernel(
    d_out, v, d_scores, d_out_b, d_out_t, d_out_h, v_b, v_t, v_h, tokens, num_chunks, heads, scale,
    V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_scores = scale d_out v'`` [b, h, n, C, C] for rows after columns, else zero."""
    pid = tl.program_id(0)
    h, n, b = pid % heads, pid // heads % num_chunks, pid // heads // num_chunks
    rows, num_rows = tl.arange(0, C), tokens - n * C
    d_out_n, v_n = base_of(d_out, b, h, n * C, d_out_b, d_out_t, d_out_h), base_of(v, b, h, n * C, v_b, v_t, v_h)
    dtype: tl.constexpr = tl.float64 if v.dtype.element_ty == tl.float64 else tl.float32
    pairs = tl.zeros([C, C], dtype)
    for vb in range((V + BV - 1) // BV):
        columns = vb * BV + tl.arange(0, BV)
        d_out_tile = load_tile(d_out_n, d_out_t, rows, columns, num_rows, V)
        v_tile = load_tile(v_n, v_t, rows, columns, num_rows, V)
        pairs = product(d_out_tile, tl.trans(v_tile), pairs, PRECISION)
    pairs = tl.where(rows[:, None] > rows[None, :], pairs * scale, 0.0)
    at = d_scores + ((b * heads + h).to(tl.int64) * num_chunks + n) * C * C
    tl.store(at + rows[:, None] * C + rows[None, :], narrow(pairs, d_scores.dtype.element_ty))


@triton.jit
def sum_over(passes, x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """``passes @ x`` for a matrix of ones and zeros; what is not passed leaves no trace, not even in rounding.

    On the matrix units, x is two bf16 numbers: 16 bits, for what was made of 16-bit inputs. ``dtype`` is that of those.
    """
    if dtype == tl.float32 or dtype == tl.float64:
        return product(tl.where(passes, 1.0, 0.0).to(x.dtype), x, tl.zeros_like(x), PRECISION)
    ones = tl.where(passes, 1.0, 0.0).to(tl.bfloat16)
    high = narrow(x, tl.bfloat16)
    low = narrow(x - high.to(tl.float32), tl.bfloat16)
    return product(ones, high, product(ones, low, tl.zeros_like(x), PRECISION), PRECISION)


@triton.jit
def sum_rows(passes, x):
    """``passes @ x`` for one number per row."""
    return tl.sum(tl.where(passes, x[None, :], 0.0), 1)


@triton.jit
def full_state(
    states, boundary, reach, n, rows, columns, K: tl.constexpr, V: tl.constexpr, dtype: tl.constexpr,
    BOUNDARY: tl.constexpr, REACH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Block of a state, with what is left of the boundary state; ``rows`` are key channels, ``columns`` value dims."""
    state = load_tile(states, V, rows, columns, K, V).to(dtype)
    if BOUNDARY:
        edge = load_tile(boundary, V, rows, columns, K, V).to(dtype)
        if REACH:
            left = load_reach(reach, n, rows, K, VECTOR)
            edge *= left[:, None]
        state += edge
    return state


@triton.jit
def gradient_kernel(
    q, k, v, d_out, gates, sums, segments, dq_pairs, dk_pairs, states, incoming, reach, d_states, d_final, d_reach,
    dq_before, dk_before, dq, dk, d_gates,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_out_b, d_out_t, d_out_h, gates_b, gates_t, gates_h,
    sums_b, sums_h, half, segments_b, segments_h, reach_b, reach_h,
    tokens, num_chunks, heads, batch, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr,
    INCOMING: tl.constexpr, FINAL: tl.constexpr, REACH: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and the gates' gradient for one chunk and block of key channels.

    ``d_states[n]`` is the gradient of the state that leaves chunk n if that of the final state is zero; ``d_final`` and
    ``incoming`` [b, h, k, v] are added as far as they reach. With gates per channel, ``dq_pairs`` and ``dk_pairs``
    [b, h, n, C, k] are given: from pairs of different tokens in a chunk. Shared gates: d_gates [blocks, b, t, h].
    ``ADD``: dq and dk are added to those ``before``, of the other direction.
    """
    num_kb: tl.constexpr = (K + BK - 1) // BK
    dtype: tl.constexpr = incoming.dtype.element_ty
    pid = tl.program_id(0)
    kb, h, n = pid % num_kb, pid // num_kb % heads, pid // num_kb // heads % num_chunks
    b = pid // num_kb // heads // num_chunks
    rows, channels, num_rows = tl.arange(0, C), kb * BK + tl.arange(0, BK), tokens - n * C
    bh = (b * heads + h).to(tl.int64)
    at = (bh * num_chunks + n) * K * V
    sums_n = sums + b.to(tl.int64) * sums_b + h.to(tl.int64) * sums_h + n.to(tl.int64) * C
    segments_n = segments + b.to(tl.int64) * segments_b + h.to(tl.int64) * segments_h + n.to(tl.int64) * C
    gates_n = base_of(gates, b, h, n * C, gates_b, gates_t, gates_h)
    at_reach = b.to(tl.int64) * reach_b + h.to(tl.int64) * reach_h
    reach_n, d_reach_n = reach + at_reach, d_reach + at_reach
    v_n, d_out_n = base_of(v, b, h, n * C, v_b, v_t, v_h), base_of(d_out, b, h, n * C, d_out_b, d_out_t, d_out_h)
    dq_acc, dk_acc, d_pairs = tl.zeros([C, BK], dtype), tl.zeros([C, BK], dtype), tl.zeros([C, C], dtype)
    diagonal, crossing = tl.zeros([C], dtype), tl.zeros([BK], dtype)
    for vb in range((V + BV - 1) // BV):
        columns = vb * BV + tl.arange(0, BV)
        v_tile = load_tile(v_n, v_t, rows, columns, num_rows, V)
        d_out_tile = load_tile(d_out_n, d_out_t, rows, columns, num_rows, V)
        state = full_state(
            states + at, incoming + bh * K * V, reach_n, n, channels, columns, K, V, dtype, INCOMING, REACH, VECTOR
        )  # fmt: skip
        d_state = full_state(
            d_states + at, d_final + bh * K * V, d_reach_n, n, channels, columns, K, V, dtype, FINAL, REACH, VECTOR
        )  # fmt: skip
        dq_acc = state_product(d_out_tile, tl.trans(state), dq_acc, PRECISION)
        dk_acc = state_product(v_tile, tl.trans(d_state), dk_acc, PRECISION)
        if SHARED or VECTOR:
            crossing += tl.sum(state * d_state, 1)
        if VECTOR:
            diagonal += tl.sum(d_out_tile.to(dtype) * v_tile.to(dtype), 1)
        else:
            d_pairs = product(d_out_tile, tl.trans(v_tile), d_pairs, PRECISION)

    into = row_factor(sums_n, half, segments_n, C, dtype, False, SHARED, SEGMENTED, REVERSE)[:, None]
    out = row_factor(sums_n, half, segments_n, C, dtype, True, SHARED, SEGMENTED, REVERSE)[:, None]
    if VECTOR:
        into *= channel_factor(gates_n, gates_t, channels, num_rows, C, K, dtype, False, REVERSE)
        out *= channel_factor(gates_n, gates_t, channels, num_rows, C, K, dtype, True, REVERSE)
    dq_acc *= scale * into
    dk_acc *= out
    q_tile = load_tile(base_of(q, b, h, n * C, q_b, q_t, q_h), q_t, rows, channels, num_rows, K)
    k_tile = load_tile(base_of(k, b, h, n * C, k_b, k_t, k_h), k_t, rows, channels, num_rows, K)
    leaving = k_tile.to(dtype) * dk_acc
    if SHARED:
        leaving = tl.sum(leaving, 1)
    row = (b.to(tl.int64) * tokens + n * C) * heads + h
    if VECTOR:
        at_pairs = (bh * num_chunks + n) * C * K
        dq_acc += load_tile(dq_pairs + at_pairs, K, rows, channels, num_rows, K)
        dk_within = load_tile(dk_pairs + at_pairs, K, rows, channels, num_rows, K).to(dtype)
    else:
        same = rows[:, None] == rows[None, :]
        diagonal = tl.sum(tl.where(same, d_pairs, 0.0), 1)
        strict = pair_factor(sums_n, half, segments_n, C, dtype, False, True, SHARED, SEGMENTED, REVERSE)
        d_scores = narrow(d_pairs * strict * scale, q_tile.dtype)
        dq_acc = product(d_scores, k_tile, dq_acc, PRECISION)
        dk_within = product(tl.trans(d_scores), q_tile, tl.zeros([C, BK], dtype), PRECISION)
    if SHARED or VECTOR:
        arriving = q_tile.to(dtype) * dq_acc - k_tile.to(dtype) * dk_within
        if SHARED:
            arriving = tl.sum(arriving, 1)
        _, across = chunk_factor(
            gates_n, gates_t, sums_n, half, segments_n, channels, num_rows, C, K, BK, dtype,
            SHARED, VECTOR, SEGMENTED, REVERSE,
        )  # fmt: skip
        store_d_gates(
            d_gates, arriving, leaving, crossing * across, kb.to(tl.int64) * batch * tokens * heads, row, heads,
            channels, num_rows, C, K, q.dtype.element_ty, VECTOR, REVERSE, PRECISION,
        )  # fmt: skip
    diagonal = (diagonal * scale)[:, None]
    dq_acc += diagonal * k_tile.to(dtype)
    dk_acc += dk_within + diagonal * q_tile.to(dtype)
    if ADD:
        dq_acc += load_tile(dq_before + row * K, heads * K, rows, channels, num_rows, K)
        dk_acc += load_tile(dk_before + row * K, heads * K, rows, channels, num_rows, K)
    store_tile(dq + row * K, heads * K, rows, channels, num_rows, K, dq_acc)
    store_tile(dk + row * K, heads * K, rows, channels, num_rows, K, dk_acc)


@triton.jit
def store_d_gates(
    d_gates, arriving, leaving, crossing, block, row, heads, channels, num_rows, C: tl.constexpr, K: tl.constexpr,
    inputs: tl.constexpr, VECTOR: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A gate is passed by what arrives at its token or later, leaves from an earlier one, or crosses the chunk."""
    rows = tl.arange(0, C)
    later = rows[:, None] >= rows[None, :] if REVERSE else rows[:, None] <= rows[None, :]
    earlier = rows[:, None] < rows[None, :] if REVERSE else rows[:, None] > rows[None, :]
    if VECTOR:
        d = sum_over(later, arriving, inputs, PRECISION) + sum_over(earlier, leaving, inputs, PRECISION)
        d += crossing[None, :]
        store_tile(d_gates + row * K, heads * K, rows, channels, num_rows, K, d)
    else:
        d = sum_rows(later, arriving) + sum_rows(earlier, leaving) + tl.sum(crossing, 0)
        tl.store(d_gates + block + row + rows * heads, d, mask=rows < num_rows)
