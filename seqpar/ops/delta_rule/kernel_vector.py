"""Triton kernels of the delta rule, backward, where each key channel has its own decay; words as in ``kernel.py``."""

import triton
import triton.language as tl

from seqpar.ops.delta_rule.kernel import (
    block_decay,
    exact_product,
    load_across,
    load_beta,
    load_factor,
    load_gates,
    load_tokens,
    meetings,
    product,
    rounded,
    store_tokens,
)
from seqpar.ops.delta_rule.kernel_backward import chunk_gradients


@triton.jit
def channel_gates(d_in, d_out, block, C: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of gates [C, BK], from those of the decays (times decay) into the tokens of blocks, and out of them.

    A gate gets what passes it: sums of terms that each carry their own decay, and no differences.
    """
    row = tl.arange(0, C)
    one_block = row[:, None] // block == row[None, :] // block
    to_later = tl.where(one_block & (row[None, :] >= row[:, None]), 1.0, 0.0)
    from_earlier = tl.where(one_block & (row[None, :] < row[:, None]), 1.0, 0.0)
    return exact_product(to_later, d_in, WORK, PRECISION) + exact_product(from_earlier, d_out, WORK, PRECISION)


@triton.jit
def vector_gradients_kernel(
    q, k, beta, gates, into, out, across, inverse, errors, states, d_out, d_states, d_errors,
    dq, dk, dv, d_beta, d_gates, scale, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens of a chunk, for some key channels; those of beta are sums over programs."""
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
    factor = load_factor(into, chunk, column, K, C, BK, True)
    d_q *= factor
    d_k *= factor
    d_k_out *= load_factor(out, chunk, column, K, C, BK, True)
    diagonal = tl.sum(tl.where(row[:, None] == row[None, :], d_weights, 0.0), 1)
    d_strength = tl.sum(x_k * d_k_out + diagonal[:, None] * x_q * x_k, 1)
    d_k_out *= strength[:, None]
    d_gate = channel_gates(x_q * d_q + x_k * d_k, x_k * d_k_out, C, C, work, PRECISION)
    d_gate += tl.trans(load_across(across, chunk, column, K, BK, True)) * d_across[None, :]
    d_q += (diagonal * strength)[:, None] * x_k
    d_k += (diagonal * strength)[:, None] * x_q + d_k_out
    gate = load_gates(gates, chunk, column, K, C, BK)
    for level in range(LEVELS):
        factor_in, factor_out = block_decay(gate, 1 << level, C, work, PRECISION)
        meets = meetings(1 << level, C)
        d_queries, d_keys = tl.where(meets, d_weights, 0.0), tl.where(meets, d_lower, 0.0)
        queries, keys = rounded(x_q * factor_in, work), rounded(x_k * factor_in, work)
        d_earlier = product(tl.trans(rounded(d_queries, work)), queries, PRECISION)
        d_earlier += product(tl.trans(rounded(d_keys, work)), keys, PRECISION)
        d_earlier *= factor_out
        d_strength += tl.sum(x_k * d_earlier, 1)
        d_earlier *= strength[:, None]
        earlier = rounded(x_k * factor_out, work)
        d_queries, d_keys = rounded(d_queries * strength[None, :], work), rounded(d_keys * strength[None, :], work)
        d_later_q = product(d_queries, earlier, PRECISION) * factor_in
        d_later_k = product(d_keys, earlier, PRECISION) * factor_in
        d_q += d_later_q
        d_k += d_later_k + d_earlier
        d_gate += channel_gates(x_q * d_later_q + x_k * d_later_k, x_k * d_earlier, 1 << level, C, work, PRECISION)
    store_tokens(dq, d_q, sequence, first, T, H, column, K, C, BK)
    store_tokens(dk, d_k, sequence, first, T, H, column, K, C, BK)
    store_tokens(d_gates, d_gate, sequence, first, T, H, column, K, C, BK)
    at = (block.to(tl.int64) * tl.num_programs(1) * tl.num_programs(0) + chunk) * C + row
    tl.store(d_beta + at, d_strength)
