"""Both directions of decayed linear attention in one launch each; words as in ``kernel.py``.

Both directions share queries, keys and values, so the output reads them once, multiplies queries by keys once, and
weighs each pair by the decay of the direction in which one token sees the other; a token sees itself twice. The merged
scan of ViG (Liao et al. 2024, arXiv:2405.18425).
"""

import triton
import triton.language as tl

from seqpar.ops.decayed_linear_attention.kernel import (
    base_of,
    chain,
    channel_factor,
    load_scores,
    load_tile,
    narrow,
    pair_factor,
    product,
    row_factor,
    state_product,
    store_tile,
)


@triton.jit
def both_chains_kernel(
    x, y, gates, gates_back, sums, sums_back, segments, segments_back, states, states_back,
    outgoing, outgoing_back,
    x_b, x_t, x_h, y_b, y_t, y_h, gates_b, gates_t, gates_h, sums_b, sums_h, half, segments_b, segments_h,
    tokens, num_chunks, heads, scale, programs,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The states of the scan from the first token, and of that from the last: as many ``programs`` for each."""
    pid = tl.program_id(0)
    if pid < programs:
        chain(
            pid, x, y, gates, sums, segments, outgoing, states, outgoing, outgoing, outgoing,
            x_b, x_t, x_h, y_b, y_t, y_h, gates_b, gates_t, gates_h, sums_b, sums_h, half, segments_b, segments_h,
            tokens, num_chunks, num_chunks, 1, heads, scale, K, V, C, BK, BV,
            SHARED, VECTOR, SEGMENTED, False, BACKWARD, True, False, False, False, PRECISION,
        )  # fmt: skip
    else:
        chain(
            pid - programs, x, y, gates_back, sums_back, segments_back,
            outgoing_back, states_back, outgoing_back, outgoing_back, outgoing_back,
            x_b, x_t, x_h, y_b, y_t, y_h, gates_b, gates_t, gates_h, sums_b, sums_h, half, segments_b, segments_h,
            tokens, num_chunks, num_chunks, 1, heads, scale, K, V, C, BK, BV,
            SHARED, VECTOR, SEGMENTED, True, BACKWARD, True, False, False, False, PRECISION,
        )  # fmt: skip


@triton.jit
def direction_factor(
    gates, stride, sums, half, segments, columns, num_rows, C: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr,
    SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, REVERSE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """``into`` or ``out`` of one direction, [C, 1] or [C, channels]."""
    factor = row_factor(sums, half, segments, C, dtype, OUT, SHARED, SEGMENTED, REVERSE)[:, None]
    if VECTOR:
        factor *= channel_factor(gates, stride, columns, num_rows, C, K, dtype, OUT, REVERSE)
    return factor


@triton.jit
def both_outputs_kernel(
    x, y, z, gates, gates_back, sums, sums_back, segments, segments_back, scores, scores_back, states, states_back,
    unused, out,
    x_b, x_t, x_h, y_b, y_t, y_h, z_b, z_t, z_h, gates_b, gates_t, gates_h, sums_b, sums_h, half,
    segments_b, segments_h, tokens, num_chunks, heads, pair_scale, state_scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SHARED: tl.constexpr, VECTOR: tl.constexpr, SEGMENTED: tl.constexpr, BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As :func:`kernel.output_kernel`, summed over both directions."""
    num_vb: tl.constexpr = (V + BV - 1) // BV
    dtype: tl.constexpr = unused.dtype.element_ty
    pid = tl.program_id(0)
    vb, h, n = pid % num_vb, pid // num_vb % heads, pid // num_vb // heads % num_chunks
    b = pid // num_vb // heads // num_chunks
    rows, v, num_rows = tl.arange(0, C), vb * BV + tl.arange(0, BV), tokens - n * C
    at_chunk = (b * heads + h).to(tl.int64) * num_chunks + n
    at_sums = b.to(tl.int64) * sums_b + h.to(tl.int64) * sums_h + n.to(tl.int64) * C
    at_segments = b.to(tl.int64) * segments_b + h.to(tl.int64) * segments_h + n.to(tl.int64) * C
    x_n, y_n = base_of(x, b, h, n * C, x_b, x_t, x_h), base_of(y, b, h, n * C, y_b, y_t, y_h)
    gates_n = base_of(gates, b, h, n * C, gates_b, gates_t, gates_h)
    gates_back_n = base_of(gates_back, b, h, n * C, gates_b, gates_t, gates_h)
    acc, pairs = tl.zeros([C, BV], dtype), tl.zeros([C, C], dtype)
    for kb in range((K + BK - 1) // BK):
        k = kb * BK + tl.arange(0, BK)
        x_tile = load_tile(x_n, x_t, rows, k, num_rows, K)
        factor = direction_factor(
            gates_n, gates_t, sums + at_sums, half, segments + at_segments, k, num_rows, C, K, dtype,
            SHARED, VECTOR, SEGMENTED, False, BACKWARD,
        )  # fmt: skip
        forth = narrow(x_tile.to(dtype) * factor, x_tile.dtype)
        acc = state_product(forth, load_tile(states + at_chunk * K * V, V, k, v, K, V), acc, PRECISION)
        factor = direction_factor(
            gates_back_n, gates_t, sums_back + at_sums, half, segments_back + at_segments, k, num_rows, C, K, dtype,
            SHARED, VECTOR, SEGMENTED, True, BACKWARD,
        )  # fmt: skip
        back = narrow(x_tile.to(dtype) * factor, x_tile.dtype)
        acc = state_product(back, load_tile(states_back + at_chunk * K * V, V, k, v, K, V), acc, PRECISION)
        if not VECTOR:
            pairs = product(x_tile, tl.trans(load_tile(y_n, y_t, rows, k, num_rows, K)), pairs, PRECISION)
    if VECTOR:
        pairs = load_scores(scores + at_chunk * C * C, C, BACKWARD).to(dtype)
        pairs += load_scores(scores_back + at_chunk * C * C, C, not BACKWARD).to(dtype)
    else:
        pairs *= pair_factor(
            sums + at_sums, half, segments + at_segments, C, dtype, BACKWARD, False, SHARED, SEGMENTED, False
        ) + pair_factor(
            sums_back + at_sums, half, segments_back + at_segments, C, dtype, BACKWARD, False, SHARED, SEGMENTED, True
        )
    z_tile = load_tile(base_of(z, b, h, n * C, z_b, z_t, z_h), z_t, rows, v, num_rows, V)
    acc = product(narrow(pairs * pair_scale, z_tile.dtype), z_tile, acc * state_scale, PRECISION)
    store_tile(out + ((b.to(tl.int64) * tokens + n * C) * heads + h) * V, heads * V, rows, v, num_rows, V, acc)
