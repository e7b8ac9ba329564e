"""Triton kernels of the delta rule, forward. ``reference.py`` says what they compute; ``stages.py`` starts them.

Tokens' tensors are [b, t, h, d]; ``T`` tokens, ``H`` heads, a program's sequence is one batch and head. Everything else
lies in chunks, [b h, n, C, d] with n C >= T, tokens beyond the last as zeros. Loads give fp32, and operands of dots are
brought to ``work``, the dtype between kernels: where nothing happened to them, a compiler sees that nothing is to do.
PRECISION is that of dots of fp32 operands. Offsets into tensors are int64.
"""

import triton
import triton.language as tl

WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter multiplies the bits of bf16 as integers


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in fp32 sums."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def tile_of(base, first, ROWS_IN_ALL, stride, column, COLUMNS_IN_ALL, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to rows from ``first`` and columns from ``column`` of a matrix, and which of them exist."""
    rows, columns = first + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    exists = (rows[:, None] < ROWS_IN_ALL) & (columns[None, :] < COLUMNS_IN_ALL)
    return base + rows[:, None].to(tl.int64) * stride + columns[None, :], exists


@triton.jit
def load_tokens(x, sequence, first, T, H, column, D, C: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of one batch and head of x [b, t, h, d]."""
    base = x + ((sequence // H).to(tl.int64) * T * H + sequence % H) * D
    at, exists = tile_of(base, first, T, H * D, column, D, C, BLOCK)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(x, value, sequence, first, T, H, column, D, C: tl.constexpr, BLOCK: tl.constexpr):
    base = x + ((sequence // H).to(tl.int64) * T * H + sequence % H) * D
    at, exists = tile_of(base, first, T, H * D, column, D, C, BLOCK)
    tl.store(at, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def load_chunk(x, chunk, column, D, C: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of one of the chunks, counted over all sequences, of x [..., C, d]."""
    at, exists = tile_of(x + chunk.to(tl.int64) * C * D, 0, C, D, column, D, C, BLOCK)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_chunk(x, value, chunk, column, D, C: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = tile_of(x + chunk.to(tl.int64) * C * D, 0, C, D, column, D, C, BLOCK)
    tl.store(at, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def load_state(x, index, row, column, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """A block of one of the states x [..., k, v]."""
    at, exists = tile_of(x + index.to(tl.int64) * K * V, row, K, V, column, V, BK, BV)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_state(x, value, index, row, column, K, V, BK: tl.constexpr, BV: tl.constexpr):
    at, exists = tile_of(x + index.to(tl.int64) * K * V, row, K, V, column, V, BK, BV)
    tl.store(at, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def load_factor(x, chunk, column, K, C: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr):
    """What the decay does to the rows of a chunk, [C, 1], or [C, BK] where each key channel has its own."""
    if VECTOR:
        return load_chunk(x, chunk, column, K, C, BK)
    return tl.load(x + chunk.to(tl.int64) * C + tl.arange(0, C))[:, None]


@triton.jit
def load_across(x, chunk, column, K, BK: tl.constexpr, VECTOR: tl.constexpr):
    """What the decay of a whole chunk does to a state, [1, 1] or [BK, 1]."""
    channels = tl.arange(0, BK if VECTOR else 1)
    width = K if VECTOR else 1
    at = x + chunk.to(tl.int64) * width + column * VECTOR + channels
    return tl.load(at, mask=column * VECTOR + channels < width, other=0.0)[:, None]


@triton.jit
def load_beta(beta, sequence, first, T, H, C: tl.constexpr):
    rows = first + tl.arange(0, C)
    at = beta + ((sequence // H).to(tl.int64) * T + rows) * H + sequence % H
    return tl.load(at, mask=rows < T, other=0.0).to(tl.float32)


@triton.jit
def decay_pairs(gates, documents, chunk, first, C: tl.constexpr, GATED: tl.constexpr):
    """[C, C]: the decay from token j to token i, zero for j after i and from document to document.

    Logarithms are summed from j to i, for each j anew: a difference of two sums would be wrong in strong decay, and
    undefined after a decay of zero.
    """
    rows = tl.arange(0, C)
    document = tl.load(documents + first + rows)
    meets = (rows[:, None] >= rows[None, :]) & (document[:, None] == document[None, :])
    if not GATED:
        return tl.where(meets, 1.0, 0.0)
    gate = tl.load(gates + chunk.to(tl.int64) * C + rows)
    passed = tl.cumsum(tl.where(rows[:, None] > rows[None, :], gate[:, None], 0.0), 0)
    return tl.where(meets, tl.exp(passed), 0.0)


@triton.jit
def solve_small(lower, C: tl.constexpr):
    """Inverses of ``1 + lower`` in each 16 x 16 block on the diagonal of [C, C], by forward substitution."""
    BLOCKS: tl.constexpr = C // 16
    block, row = tl.arange(0, BLOCKS), tl.arange(0, 16)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    lower = tl.sum(tl.where(diagonal, tl.reshape(lower, [BLOCKS, 16, BLOCKS, 16]), 0.0), 2)
    inverse = tl.where(row[None, :, None] == row[None, None, :], 1.0, 0.0) + tl.zeros_like(lower)
    for i in range(1, 16):
        factors = tl.sum(tl.where(row[None, :, None] == i, lower, 0.0), 1)
        known = tl.sum(factors[:, :, None] * inverse, 1)
        inverse = tl.where(row[None, :, None] == i, inverse - known[:, None, :], inverse)
    return tl.reshape(tl.where(diagonal, inverse[:, :, None, :], 0.0), [C, C])


@triton.jit
def join_blocks(inverse, lower, C: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of blocks twice as large, from those of ``BLOCK`` rows."""
    row = tl.arange(0, C)
    one_pair = row[:, None] // (2 * BLOCK) == row[None, :] // (2 * BLOCK)
    between = tl.where(one_pair & (row[:, None] // BLOCK != row[None, :] // BLOCK), lower, 0.0)
    left = product(inverse, between, PRECISION)
    return inverse - product(left, inverse, PRECISION)


@triton.jit
def solve(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse of ``1 + lower`` [C, C] in fp32; ``lower`` is zero on and above the diagonal."""
    inverse = solve_small(lower, C)
    if C > 16:
        inverse = join_blocks(inverse, lower, C, 16, PRECISION)
    if C > 32:
        inverse = join_blocks(inverse, lower, C, 32, PRECISION)
    return inverse


@triton.jit
def chunk_kernel(
    q, k, v, beta, gates, documents, into, weights, inverse, erase, values, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk does to a state: ``erase`` and ``values``, with the inverse; and the scores of its queries."""
    n, sequence = tl.program_id(0), tl.program_id(1)
    first, chunk = n * C, sequence.to(tl.int64) * tl.num_programs(0) + n
    work: tl.constexpr = erase.dtype.element_ty
    row = tl.arange(0, C)
    queries_keys, keys_keys = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for column in range(0, K, BK):
        x_q = load_tokens(q, sequence, first, T, H, column, K, C, BK).to(work)
        x_k = tl.trans(load_tokens(k, sequence, first, T, H, column, K, C, BK).to(work))
        queries_keys += product(x_q, x_k, PRECISION)
        keys_keys += product(tl.trans(x_k), x_k, PRECISION)
    decay = decay_pairs(gates, documents, chunk, first, C, GATED)
    store_chunk(weights, queries_keys * decay, chunk, 0, C, C, C)
    strength = load_beta(beta, sequence, first, T, H, C)
    lower = tl.where(row[:, None] > row[None, :], keys_keys * decay, 0.0) * strength[None, :]
    solved = solve(lower, C, PRECISION).to(work)
    store_chunk(inverse, solved, chunk, 0, C, C, C)
    for column in range(0, K, BK):
        x_k = load_tokens(k, sequence, first, T, H, column, K, C, BK) * load_factor(
            into, chunk, column, K, C, BK, False
        )
        store_chunk(erase, product(solved, x_k.to(work), PRECISION), chunk, column, K, C, BK)
    for column in range(0, V, BV):
        x_v = load_tokens(v, sequence, first, T, H, column, V, C, BV).to(work)
        store_chunk(values, product(solved, x_v, PRECISION), chunk, column, V, C, BV)


@triton.jit
def written_keys(
    k, beta, out, sequence, chunk, first, T, H, K, C: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr
):
    """Keys as they reach the end of their chunk, times beta, in fp32."""
    strength = load_beta(beta, sequence, first, T, H, C)[:, None]
    return load_tokens(k, sequence, first, T, H, 0, K, C, BK) * (
        strength * load_factor(out, chunk, 0, K, C, BK, VECTOR)
    )


@triton.jit
def states_kernel(
    k, beta, out, across, erase, values, incoming, states, errors, final, N, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, ENTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state through all chunks of a sequence, in fp32: what enters each, and the errors of its tokens."""
    sequence, column = tl.program_id(0), tl.program_id(1) * BV
    work: tl.constexpr = erase.dtype.element_ty
    state = tl.zeros([BK, BV], tl.float32)
    if ENTERS:
        state += load_state(incoming, sequence, 0, column, K, V, BK, BV)
    for n in range(N):
        chunk = sequence.to(tl.int64) * N + n
        store_state(states, state, chunk, 0, column, K, V, BK, BV)
        erased = product(load_chunk(erase, chunk, 0, K, C, BK).to(work), state.to(work), PRECISION)
        error = load_chunk(values, chunk, column, V, C, BV) - erased
        store_chunk(errors, error, chunk, column, V, C, BV)
        keys = written_keys(k, beta, out, sequence, chunk, n * C, T, H, K, C, BK, VECTOR).to(work)
        added = product(tl.trans(keys), error.to(work), PRECISION)
        state = load_across(across, chunk, 0, K, BK, VECTOR) * state + added
    store_state(final, state, sequence, 0, column, K, V, BK, BV)


@triton.jit
def transition_kernel(
    k, beta, out, across, erase, matrix, N, T, H, K,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What all chunks of a sequence together multiply a state with; columns of the matrix, in fp32 throughout."""
    sequence, column = tl.program_id(0), tl.program_id(1) * BV
    work: tl.constexpr = erase.dtype.element_ty
    passed = tl.where(tl.arange(0, BK)[:, None] == column + tl.arange(0, BV)[None, :], 1.0, 0.0)
    for n in range(N):
        chunk = sequence.to(tl.int64) * N + n
        erased = product(load_chunk(erase, chunk, 0, K, C, BK), passed, PRECISION)
        keys = written_keys(k, beta, out, sequence, chunk, n * C, T, H, K, C, BK, VECTOR).to(work).to(tl.float32)
        removed = product(tl.trans(keys), erased, PRECISION)
        passed = load_across(across, chunk, 0, K, BK, VECTOR) * passed - removed
    store_state(matrix, passed, sequence, 0, column, K, K, BK, BV)


@triton.jit
def output_kernel(
    q, beta, into, weights, errors, states, o, scale, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries read: the state that enters their chunk, and what was written since."""
    n, sequence, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    first, chunk = n * C, sequence.to(tl.int64) * tl.num_programs(0) + n
    work: tl.constexpr = states.dtype.element_ty
    read = tl.zeros([C, BV], tl.float32)
    for row in range(0, K, BK):
        x_q = load_tokens(q, sequence, first, T, H, row, K, C, BK) * load_factor(into, chunk, row, K, C, BK, VECTOR)
        state = load_state(states, chunk, row, column, K, V, BK, BV).to(work)
        read += product(x_q.to(work), state, PRECISION)
    strength = load_beta(beta, sequence, first, T, H, C)[:, None]
    written = (load_chunk(errors, chunk, column, V, C, BV) * strength).to(work)
    read += product(load_chunk(weights, chunk, 0, C, C, C).to(work), written, PRECISION)
    store_tokens(o, read * scale, sequence, first, T, H, column, V, C, BV)
