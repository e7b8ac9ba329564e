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
def add_product(total, a, b, PRECISION: tl.constexpr):
    """``total + a @ b``, in the registers of ``total``."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def exact_product(a, b, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` with all digits of ``b``, fp32, for ``a`` rounded to WORK: three bf16 numbers make one of fp32."""
    if WIDEN or tl.bfloat16 != WORK:
        return tl.dot(a.to(tl.float32), b, input_precision=PRECISION)
    a, high = a.to(WORK), b.to(WORK)
    rest = b - high.to(tl.float32)
    middle = rest.to(WORK)
    low = (rest - middle.to(tl.float32)).to(WORK)
    return tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low)))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x``, fp32, in another dtype, rounded to the nearest: the interpreter cuts bf16 off, and errors would add up."""
    if WIDEN and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def tile_of(base, first, ROWS_IN_ALL, stride, column, COLUMNS_IN_ALL, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to rows from ``first`` and columns from ``column`` of a matrix, and which of them exist.

    Offsets within a tile fit 32 bits, which takes half the registers.
    """
    rows, columns = tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    exists = (rows[:, None] < ROWS_IN_ALL - first) & (columns[None, :] < COLUMNS_IN_ALL)
    return base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :]), exists


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
    tl.store(at, rounded(value, x.dtype.element_ty), mask=exists)


@triton.jit
def load_chunk(x, chunk, column, D, C: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of one of the chunks, counted over all sequences, of x [..., C, d]."""
    at, exists = tile_of(x + chunk.to(tl.int64) * C * D, 0, C, D, column, D, C, BLOCK)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_chunk(x, value, chunk, column, D, C: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = tile_of(x + chunk.to(tl.int64) * C * D, 0, C, D, column, D, C, BLOCK)
    tl.store(at, rounded(value, x.dtype.element_ty), mask=exists)


@triton.jit
def load_state(x, index, row, column, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """A block of one of the states x [..., k, v]."""
    at, exists = tile_of(x + index.to(tl.int64) * K * V, row, K, V, column, V, BK, BV)
    return tl.load(at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_state(x, value, index, row, column, K, V, BK: tl.constexpr, BV: tl.constexpr):
    at, exists = tile_of(x + index.to(tl.int64) * K * V, row, K, V, column, V, BK, BV)
    tl.store(at, rounded(value, x.dtype.element_ty), mask=exists)


@triton.jit
def load_factor(x, chunk, column, K, C: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr):
    """What the decay does to the rows of a chunk, [C, 1], or [C, BK] where each key channel has its own."""
    if VECTOR:
        factor = load_chunk(x, chunk, column, K, C, BK)
    else:
        factor = tl.load(x + chunk.to(tl.int64) * C + tl.arange(0, C))[:, None]
    return factor


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
def decay_pairs(gates, chunk, C: tl.constexpr, GATED: tl.constexpr):
    """[C, C]: the decay from token j to token i, zero for j after i.

    Logarithms are summed from j to i, for each j anew: a difference of two sums would be wrong in strong decay, and
    undefined after a decay of zero.
    """
    rows = tl.arange(0, C)
    if not GATED:
        return tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0)
    gate = tl.load(gates + chunk.to(tl.int64) * C + rows)
    passed = tl.cumsum(tl.where(rows[:, None] > rows[None, :], gate[:, None], 0.0), 0)
    return tl.where(rows[:, None] >= rows[None, :], tl.exp(passed), 0.0)


@triton.jit
def block_decay(gates, block, C: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr):
    """Decay [C, BK] from the first token of each block to its tokens, and from those to its last."""
    row = tl.arange(0, C)
    one_block = row[:, None] // block == row[None, :] // block
    before = tl.where(one_block & (row[None, :] <= row[:, None]), 1.0, 0.0)
    after = tl.where(one_block & (row[None, :] > row[:, None]), 1.0, 0.0)
    into, out = exact_product(before, gates, WORK, PRECISION), exact_product(after, gates, WORK, PRECISION)
    return tl.exp(into), tl.exp(out)


@triton.jit
def load_gates(gates, chunk, column, K, C: tl.constexpr, BK: tl.constexpr):
    """The gates of the tokens of a chunk, [C, BK], finite, for they are summed by products: exp(-120) is zero."""
    return tl.maximum(load_chunk(gates, chunk, column, K, C, BK), -120.0)


@triton.jit
def meetings(block, C: tl.constexpr):
    """[C, C]: whether token i is in the later, token j in the earlier of two neighbouring blocks that make a pair."""
    row = tl.arange(0, C) // block
    return (row[:, None] // 2 == row[None, :] // 2) & (row[:, None] > row[None, :])


@triton.jit
def vector_scores(
    q, k, gates, sequence, chunk, first, T, H, K,
    C: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of queries and keys, and of keys and keys, [C, C], where each key channel has its own decay.

    Blocks of tokens double in size, from 1 to C / 2. Where two meet, the decay between their tokens is that to the end
    of the earlier one times that from the beginning of the later one: factors up to one, whose logarithms are sums.
    """
    row = tl.arange(0, C)
    queries_keys, keys_keys = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for column in range(0, K, BK):
        x_q = load_tokens(q, sequence, first, T, H, column, K, C, BK)
        x_k = load_tokens(k, sequence, first, T, H, column, K, C, BK)
        gate = load_gates(gates, chunk, column, K, C, BK)
        queries_keys += tl.where(row[:, None] == row[None, :], tl.sum(x_q * x_k, 1)[:, None], 0.0)
        for level in range(LEVELS):
            into, out = block_decay(gate, 1 << level, C, WORK, PRECISION)
            earlier, meets = tl.trans(rounded(x_k * out, WORK)), meetings(1 << level, C)
            queries_keys += tl.where(meets, product(rounded(x_q * into, WORK), earlier, PRECISION), 0.0)
            keys_keys += tl.where(meets, product(rounded(x_k * into, WORK), earlier, PRECISION), 0.0)
    return queries_keys, keys_keys


@triton.jit
def shared_scores(
    q, k, gates, sequence, chunk, first, T, H, K,
    C: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, WORK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same where all key channels decay alike."""
    queries_keys, keys_keys = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for column in range(0, K, BK):
        x_q = rounded(load_tokens(q, sequence, first, T, H, column, K, C, BK), WORK)
        x_k = tl.trans(rounded(load_tokens(k, sequence, first, T, H, column, K, C, BK), WORK))
        queries_keys += product(x_q, x_k, PRECISION)
        keys_keys += product(tl.trans(x_k), x_k, PRECISION)
    decay = decay_pairs(gates, chunk, C, GATED)
    return queries_keys * decay, keys_keys * decay


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
    q, k, v, beta, gates, into, weights, inverse, erase, values, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, VECTOR: tl.constexpr,
    LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk does to a state: ``erase`` and ``values``, with the inverse; and the scores of its queries."""
    n, sequence = tl.program_id(0), tl.program_id(1)
    first, chunk = n * C, sequence.to(tl.int64) * tl.num_programs(0) + n
    work: tl.constexpr = erase.dtype.element_ty
    row = tl.arange(0, C)
    if VECTOR:
        scores, lower = vector_scores(q, k, gates, sequence, chunk, first, T, H, K, C, BK, LEVELS, work, PRECISION)
    else:
        scores, lower = shared_scores(q, k, gates, sequence, chunk, first, T, H, K, C, BK, GATED, work, PRECISION)
    strength = load_beta(beta, sequence, first, T, H, C)[None, :]
    store_chunk(weights, scores * strength, chunk, 0, C, C, C)
    lower = tl.where(row[:, None] > row[None, :], lower, 0.0) * strength
    solved = rounded(solve(lower, C, PRECISION), work)
    store_chunk(inverse, solved, chunk, 0, C, C, C)
    for column in range(0, K, BK):
        x_k = load_tokens(k, sequence, first, T, H, column, K, C, BK)
        x_k = rounded(x_k * load_factor(into, chunk, column, K, C, BK, VECTOR), work)
        store_chunk(erase, product(solved, x_k, PRECISION), chunk, column, K, C, BK)
    for column in range(0, V, BV):
        x_v = rounded(load_tokens(v, sequence, first, T, H, column, V, C, BV), work)
        store_chunk(values, product(solved, x_v, PRECISION), chunk, column, V, C, BV)


@triton.jit
def reaching(
    x, decay, sequence, chunk, first, T, H, column, K,
    C: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Rows of queries or keys, and what of them reaches an end of the chunk; that is in the rows where it must be."""
    rows = load_tokens(x, sequence, first, T, H, column, K, C, BK)
    factor = load_factor(decay, chunk, column, K, C, BK, VECTOR)
    if VECTOR:
        rows, factor = rows * factor, tl.full([C, 1], 1.0, tl.float32)
    return rounded(rows, WORK), factor


@triton.jit
def written_keys(
    k, beta, out, sequence, chunk, first, T, H, K,
    C: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Keys, and a factor for each, the product of which is beta times the keys as they reach the end of their chunk."""
    keys, factor = reaching(k, out, sequence, chunk, first, T, H, 0, K, C, BK, VECTOR, WORK)
    return keys, factor * load_beta(beta, sequence, first, T, H, C)[:, None]


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
        erased = product(rounded(load_chunk(erase, chunk, 0, K, C, BK), work), rounded(state, work), PRECISION)
        error = load_chunk(values, chunk, column, V, C, BV) - erased
        store_chunk(errors, error, chunk, column, V, C, BV)
        keys, factor = written_keys(k, beta, out, sequence, chunk, n * C, T, H, K, C, BK, VECTOR, work)
        added = product(tl.trans(keys), rounded(error * factor, work), PRECISION)
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
        erased = exact_product(rounded(load_chunk(erase, chunk, 0, K, C, BK), work), passed, work, PRECISION)
        keys, factor = written_keys(k, beta, out, sequence, chunk, n * C, T, H, K, C, BK, VECTOR, work)
        removed = exact_product(tl.trans(keys), erased * factor, work, PRECISION)
        passed = load_across(across, chunk, 0, K, BK, VECTOR) * passed - removed
    store_state(matrix, passed, sequence, 0, column, K, K, BK, BV)


@triton.jit
def output_kernel(
    q, into, weights, errors, states, o, scale, T, H, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries read: the state that enters their chunk, and what was written since."""
    n, sequence, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BV
    first, chunk = n * C, sequence.to(tl.int64) * tl.num_programs(0) + n
    work: tl.constexpr = states.dtype.element_ty
    read, factor = tl.zeros([C, BV], tl.float32), tl.zeros([C, 1], tl.float32)
    for row in range(0, K, BK):
        queries, factor = reaching(q, into, sequence, chunk, first, T, H, row, K, C, BK, VECTOR, work)
        state = rounded(load_state(states, chunk, row, column, K, V, BK, BV), work)
        read += product(queries, state, PRECISION)
    error = rounded(load_chunk(errors, chunk, column, V, C, BV), work)
    read = read * factor + product(rounded(load_chunk(weights, chunk, 0, C, C, C), work), error, PRECISION)
    store_tokens(o, read * scale, sequence, first, T, H, column, V, C, BV)
