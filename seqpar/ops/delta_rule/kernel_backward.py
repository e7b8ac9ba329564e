"""Triton kernels of the delta rule, backward; layout and words as in ``kernel.py``."""

import triton
import triton.language as tl

from seqpar.ops.delta_rule.kernel import (
    add_product,
    decay_pairs,
    load_across,
    load_beta,
    load_chunk,
    load_factor,
    load_state,
    load_tokens,
    product,
    reaching,
    rounded,
    store_chunk,
    store_state,
    store_tokens,
    written_keys,
)


@triton.jit
def d_states_kernel(
    q, k, beta, into, out, across, erase, weights, d_out, d_final, d_states, d_errors, d_incoming, scale,
    N, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, ENTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state back through all chunks of a sequence: what enters each, and that of its errors."""
    sequence, column = tl.program_id(0), tl.program_id(1) * BV
    work: tl.constexpr = erase.dtype.element_ty
    d_state = tl.zeros([BK, BV], tl.float32)
    if ENTERS:
        d_state += load_state(d_final, sequence, 0, column, K, V, BK, BV)
    for back in range(N):
        n = N - 1 - back
        first, chunk = n * C, sequence.to(tl.int64) * N + n
        store_state(d_states, d_state, chunk, 0, column, K, V, BK, BV)
        d_o = rounded(load_tokens(d_out, sequence, first, T, H, column, V, C, BV), work)
        d_error = product(tl.trans(rounded(load_chunk(weights, chunk, 0, C, C, C), work)), d_o, PRECISION) * scale
        keys, factor = written_keys(k, beta, out, sequence, chunk, first, T, H, K, C, BK, VECTOR, work)
        d_error += product(keys, rounded(d_state, work), PRECISION) * factor
        store_chunk(d_errors, d_error, chunk, column, V, C, BV)
        d_state *= load_across(across, chunk, 0, K, BK, VECTOR)
        x_erase = tl.trans(rounded(load_chunk(erase, chunk, 0, K, C, BK), work))
        d_state = add_product(d_state, x_erase, rounded(-d_error, work), PRECISION)
        queries, factor = reaching(q, into, sequence, chunk, first, T, H, 0, K, C, BK, VECTOR, work)
        d_state = add_product(d_state, tl.trans(queries), rounded(d_o * (factor * scale), work), PRECISION)
    store_state(d_incoming, d_state, sequence, 0, column, K, V, BK, BV)


@triton.jit
def chunk_gradients(
    inverse, errors, states, d_out, d_states, d_errors, dv, sequence, chunk, first, block, scale, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk before decay and beta: of both scores [C, C]; for a block of key channels, of queries and
    keys as they meet the entering state, keys as they reach the leaving one [C, BK], and what crosses the chunk [BK].
    The first block stores dv."""
    solved = tl.trans(rounded(load_chunk(inverse, chunk, 0, C, C, C), WORK))
    d_weights, d_lower = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    d_q, d_k, d_k_out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    d_across = tl.zeros([BK], tl.float32)
    for value in range(0, V, BV):
        d_o = rounded(load_tokens(d_out, sequence, first, T, H, value, V, C, BV), WORK)
        error = rounded(load_chunk(errors, chunk, value, V, C, BV), WORK)
        x_dv = product(solved, rounded(load_chunk(d_errors, chunk, value, V, C, BV), WORK), PRECISION)
        if block == 0:
            store_tokens(dv, x_dv, sequence, first, T, H, value, V, C, BV)
        x_dv = rounded(x_dv, WORK)
        state = load_state(states, chunk, block * BK, value, K, V, BK, BV)
        d_state = load_state(d_states, chunk, block * BK, value, K, V, BK, BV)
        d_across += tl.sum(state * d_state, 1)
        state, d_state = tl.trans(rounded(state, WORK)), tl.trans(rounded(d_state, WORK))
        d_weights += product(d_o, tl.trans(error), PRECISION)
        d_lower -= product(x_dv, tl.trans(error), PRECISION)
        d_q += product(d_o, state, PRECISION)
        d_k -= product(x_dv, state, PRECISION)
        d_k_out += product(error, d_state, PRECISION)
    return d_weights * scale, d_lower, d_q * scale, d_k, d_k_out, d_across


@triton.jit
def pair_gates(d_pairs, d_in, d_out, C: tl.constexpr):
    """Gradients of a chunk's gates [C], from those of the decays (times decay) between pairs, into and out of tokens.

    A gate gets what passes it. Terms are added and never taken away again: each carries its own decay, and the sum of
    those that passed may be far smaller than that of the others.
    """
    row = tl.arange(0, C)
    passing = tl.cumsum(d_pairs, 0, reverse=True) + d_out[None, :]
    passed = tl.sum(tl.where(row[:, None] > row[None, :], passing, 0.0), 1)
    return passed + tl.sum(tl.where(row[:, None] <= row[None, :], d_in[None, :], 0.0), 1)


@triton.jit
def gradients_kernel(
    q, k, beta, gates, into, out, across, inverse, errors, states, d_out, d_states, d_errors,
    dq, dk, dv, d_beta, d_gates, scale, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of a chunk, for some key channels; those of beta and gates are sums over programs."""
    n, sequence, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, chunk, column = n * C, sequence.to(tl.int64) * tl.num_programs(0) + n, block * BK
    work: tl.constexpr = errors.dtype.element_ty
    row = tl.arange(0, C)
    d_weights, d_lower, d_q, d_k, d_k_out, d_across = chunk_gradients(
        inverse, errors, states, d_out, d_states, d_errors, dv, sequence, chunk, first, block, scale, T, H, K, V,
        C, BK, BV, work, PRECISION,
    )  # fmt: skip
    x_q = load_tokens(q, sequence, first, T, H, column, K, C, BK)
    x_k = load_tokens(k, sequence, first, T, H, column, K, C, BK)
    strength = load_beta(beta, sequence, first, T, H, C)
    d_q *= load_factor(into, chunk, column, K, C, BK, False)
    d_k *= load_factor(into, chunk, column, K, C, BK, False)
    d_k_out *= load_factor(out, chunk, column, K, C, BK, False)
    d_in, d_end = tl.sum(x_q * d_q + x_k * d_k, 1), tl.sum(x_k * d_k_out, 1)
    x_q, x_k = rounded(x_q, work), rounded(x_k, work)
    decay = decay_pairs(gates, chunk, C, GATED)
    d_weights *= decay
    d_lower *= tl.where(row[:, None] > row[None, :], decay, 0.0)
    pairs = d_weights * product(x_q, tl.trans(x_k), PRECISION) + d_lower * product(x_k, tl.trans(x_k), PRECISION)
    at = (block.to(tl.int64) * tl.num_programs(1) * tl.num_programs(0) + chunk) * C + row
    tl.store(d_beta + at, tl.sum(pairs, 0) + d_end)
    if GATED:
        d_gate = pair_gates(pairs * strength[None, :], d_in, d_end * strength, C)
        d_gate += tl.sum(load_across(across, chunk, 0, K, BK, False) * tl.sum(d_across, 0))
        tl.store(d_gates + at, d_gate)
    d_weights, d_lower = rounded(d_weights * strength[None, :], work), rounded(d_lower * strength[None, :], work)
    d_q += product(d_weights, x_k, PRECISION)
    store_tokens(dq, d_q, sequence, first, T, H, column, K, C, BK)
    d_k += d_k_out * strength[:, None] + product(tl.trans(d_weights), x_q, PRECISION)
    d_k += product(d_lower, x_k, PRECISION) + product(tl.trans(d_lower), x_k, PRECISION)
    store_tokens(dk, d_k, sequence, first, T, H, column, K, C, BK)
