"""Scores inside chunks under vector gates, and their gradients: Triton kernels.

A chunk is cut into sub-blocks of 16 tokens. Between two of them the decay from j to i is split at the first token of
i's sub-block: ``into[i]`` from there to i, ``out[j]`` from after j to there. Both are exp of sums of numbers <= 0, each
sum made as such, so nothing overflows and nothing cancels, and scores are a matmul (the secondary chunking of Yang et
al. 2023, arXiv:2312.06635). Inside a sub-block a decayed row takes in one more factor per step: products only, so an
exact zero stays one. Sums, factors and accumulators are fp32 (fp64 for fp64).
"""

import triton
import triton.language as tl

from seqpar.ops.decayed_linear_attention.kernel import narrow, product

SUB = 16  # tokens of a sub-block, the least that matrix units take
_SUB = tl.constexpr(SUB)


@triton.jit
def _place(program, num_chunks, heads, CHUNK: tl.constexpr):
    """My sub-block: its number in the chunk, the chunk's first token, and sequence, head and chunk as one number."""
    num_subs: tl.constexpr = CHUNK // _SUB
    sub = program % num_subs
    piece = program // num_subs
    head = piece // num_chunks
    return (
        sub,
        piece % num_chunks * CHUNK,
        piece.to(tl.int64),
        (head // heads).to(tl.int64),
        (head % heads).to(tl.int64),
    )


@triton.jit
def _tile(x, rows, stride, columns, tokens, DIM: tl.constexpr, ACC: tl.constexpr):
    """The given rows of ``x``; beyond the last token and channel it is zero."""
    inside = (rows < tokens)[:, None] & (columns < DIM)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _same_document(documents, i, j, tokens, HAS_DOCUMENTS: tl.constexpr):
    """[16, 16]: are both tokens, i and j, there and in one document?"""
    same = (i < tokens)[:, None] & (j < tokens)[None, :]
    if HAS_DOCUMENTS:
        of_i = tl.load(documents + i, mask=i < tokens, other=-1)
        of_j = tl.load(documents + j, mask=j < tokens, other=-1)
        same = same & (of_i[:, None] == of_j[None, :])
    return same


@triton.jit
def _diagonal_scores(
    q, k, g, first, q_stride, k_stride, g_stride, tokens,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores inside one sub-block (of those meant only entries j <= i), and its queries times ``into``."""
    i, columns = tl.arange(0, _SUB), tl.arange(0, BLOCK)
    inside = columns < DIM
    keys, gates = k + first.to(tl.int64) * k_stride + columns, g + first.to(tl.int64) * g_stride + columns
    scores = tl.zeros([_SUB, _SUB], ACC)
    decayed = _tile(q, first + i, q_stride, columns, tokens, DIM, ACC)
    for step in tl.static_range(_SUB):
        j = _SUB - 1 - step
        row = tl.minimum(tokens - 1 - first, j)  # beyond the last token any row will do
        key = tl.load(keys + row * k_stride, mask=inside, other=0.0).to(ACC)
        scores = tl.where(i[None, :] == j, tl.sum(decayed * key[None, :], 1)[:, None], scores)
        factor = tl.exp(tl.load(gates + row * g_stride, mask=inside, other=0.0).to(ACC))
        decayed = tl.where(i[:, None] >= j, decayed * factor[None, :], decayed)
    return scores, decayed


@triton.jit
def _keys_after(
    k, g, earlier, between, k_stride, g_stride, columns, tokens, DIM: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The keys of a sub-block, last token first, decayed to its end and on by the sums ``between``; and those sums with
    its own. In this order sums after a token are sums of what came before it, which take fewer shuffles."""
    rows = earlier + _SUB - 1 - tl.arange(0, _SUB)
    after = tl.where(rows + 1 < earlier + _SUB, rows + 1, tokens)  # nothing comes after the last
    gates = tl.cumsum(_tile(g, after, g_stride, columns, tokens, DIM, ACC), 0) + between[None, :]
    keys = narrow(_tile(k, rows, k_stride, columns, tokens, DIM, ACC) * tl.exp(gates), k.dtype.element_ty)
    return keys, between + tl.sum(_tile(g, rows, g_stride, columns, tokens, DIM, ACC), 0)


@triton.jit
def scores_kernel(
    q, k, g, documents, scores,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head,
    tokens, num_chunks, heads,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """16 rows of the scores of one chunk: ``scores`` [b, h, n, C, C]. A block holds all channels."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    sub, chunk, piece, batch, head = _place(tl.program_id(0), num_chunks, heads, CHUNK)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    g += batch * g_batch + head * g_head
    i, j = tl.arange(0, _SUB), tl.arange(0, _SUB)
    first = chunk + sub * _SUB
    rows = scores + piece * CHUNK * CHUNK + (sub * _SUB + i[:, None]) * CHUNK
    dtype = scores.dtype.element_ty
    found, queries = _diagonal_scores(q, k, g, first, q_token, k_token, g_token, tokens, DIM, BLOCK, ACC)
    queries = narrow(queries, dtype)
    same = _same_document(documents, first + i, first + j, tokens, HAS_DOCUMENTS) & (i[:, None] >= j[None, :])
    tl.store(rows + sub * _SUB + j[None, :], narrow(tl.where(same, found, 0.0), dtype))
    between = tl.zeros([BLOCK], ACC)
    columns = tl.arange(0, BLOCK)
    for step in range(sub):
        other = sub - 1 - step
        earlier = chunk + other * _SUB
        keys, between = _keys_after(k, g, earlier, between, k_token, g_token, columns, tokens, DIM, ACC)
        found = product(queries, tl.trans(keys), tl.zeros([_SUB, _SUB], ACC), "ieee")
        back = other * _SUB + _SUB - 1 - j
        same = _same_document(documents, first + i, chunk + back, tokens, HAS_DOCUMENTS)
        tl.store(rows + back[None, :], narrow(tl.where(same, found, 0.0), dtype))
    for other in range(sub + 1, CHUNK // _SUB):
        tl.store(rows + (j + other * _SUB)[None, :], tl.zeros([_SUB, _SUB], dtype))


@triton.jit
def _diagonal_dq(
    k, g, d_scores, same, first, columns, k_stride, g_stride, tokens,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the pairs inside one sub-block give to dq, and ``into``; ``d_scores`` points at its first row and column."""
    i, inside = tl.arange(0, _SUB), columns < DIM
    keys, gates = k + first.to(tl.int64) * k_stride + columns, g + first.to(tl.int64) * g_stride + columns
    low = tl.sum(tl.where(same | (i[:, None] < i[None, :]), 0, 1), 1)  # the first that i sees
    dq = tl.zeros([_SUB, BLOCK], ACC)
    into = tl.full([_SUB, BLOCK], 1.0, ACC)  # from after j, ever earlier, to i
    for step in tl.static_range(_SUB):
        j = _SUB - 1 - step
        row = tl.minimum(tokens - 1 - first, j)
        gradient = tl.load(d_scores + i * CHUNK + j, mask=(i >= j) & (low <= j), other=0.0).to(ACC)
        key = tl.load(keys + row * k_stride, mask=inside, other=0.0).to(ACC)
        dq += gradient[:, None] * (into * key[None, :])
        factor = tl.exp(tl.load(gates + row * g_stride, mask=inside, other=0.0).to(ACC))
        into = tl.where(i[:, None] >= j, into * factor[None, :], into)
    return dq, into


@triton.jit
def _diagonal_dk(
    q, g, d_scores, same, first, columns, q_stride, g_stride, tokens,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the pairs inside one sub-block give to dk, and the decay after each token to the sub-block's end."""
    j, inside = tl.arange(0, _SUB), columns < DIM
    queries, gates = q + first.to(tl.int64) * q_stride + columns, g + first.to(tl.int64) * g_stride + columns
    high = _SUB - 1 - tl.sum(tl.where(same | (j[:, None] < j[None, :]), 0, 1), 0)  # the last that sees j
    dk = tl.zeros([_SUB, BLOCK], ACC)
    out = tl.full([_SUB, BLOCK], 1.0, ACC)  # from after j to i, ever later
    for i in tl.static_range(_SUB):
        row = tl.minimum(tokens - 1 - first, i)
        factor = tl.exp(tl.load(gates + row * g_stride, mask=inside, other=0.0).to(ACC))
        out = tl.where(j[:, None] < i, out * factor[None, :], out)
        gradient = tl.load(d_scores + i * CHUNK + j, mask=(j <= i) & (high >= i), other=0.0).to(ACC)
        query = tl.load(queries + row * q_stride, mask=inside, other=0.0).to(ACC)
        dk += gradient[:, None] * (out * query[None, :])
    return dk, out


@triton.jit
def _pair_dq(
    k, g, d_scores, documents, sub, chunk, columns, k_stride, g_stride, tokens,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What earlier sub-blocks give to dq of sub-block ``sub``, before ``into``; ``d_scores`` points at its chunk."""
    i, j = tl.arange(0, _SUB), tl.arange(0, _SUB)
    first = chunk + sub * _SUB
    dq = tl.zeros([_SUB, BLOCK], ACC)
    between = tl.zeros([BLOCK], ACC)
    for step in range(sub):
        other = sub - 1 - step
        earlier = chunk + other * _SUB
        back = other * _SUB + _SUB - 1 - j
        same = _same_document(documents, first + i, chunk + back, tokens, HAS_DOCUMENTS)
        gradient = tl.load(d_scores + (sub * _SUB + i)[:, None] * CHUNK + back[None, :], mask=same, other=0.0)
        keys, between = _keys_after(k, g, earlier, between, k_stride, g_stride, columns, tokens, DIM, ACC)
        dq = product(narrow(gradient, keys.dtype), keys, dq, "ieee")
    return dq


@triton.jit
def _pair_dk(
    q, g, d_scores, documents, sub, chunk, columns, q_stride, g_stride, tokens,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What later sub-blocks give to dk of sub-block ``sub``, before the decay to its end."""
    i, j = tl.arange(0, _SUB), tl.arange(0, _SUB)
    first = chunk + sub * _SUB
    dk = tl.zeros([_SUB, BLOCK], ACC)
    between = tl.zeros([BLOCK], ACC)
    for other in range(sub + 1, CHUNK // _SUB):
        later = chunk + other * _SUB
        same = _same_document(documents, later + i, first + j, tokens, HAS_DOCUMENTS)
        at = d_scores + (i + other * _SUB)[:, None] * CHUNK + (sub * _SUB + j)[None, :]
        gradient = tl.load(at, mask=same, other=0.0)
        gates = _tile(g, later + i, g_stride, columns, tokens, DIM, ACC)
        into = tl.exp(tl.cumsum(gates, 0) + between[None, :])
        queries = narrow(_tile(q, later + i, q_stride, columns, tokens, DIM, ACC) * into, q.dtype.element_ty)
        dk = product(tl.trans(narrow(gradient, queries.dtype)), queries, dk, "ieee")
        between += tl.sum(gates, 0)
    return dk


@triton.jit
def scores_backward_kernel(
    q, k, g, documents, d_scores, dq, dk,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head,
    tokens, num_chunks, heads,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """16 rows of dq or of dk [b, h, n, C, k] for one block of channels, from ``d_scores`` [b, h, n, C, C]."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    sub, chunk, piece, batch, head = _place(tl.program_id(0) // 2, num_chunks, heads, CHUNK)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    g += batch * g_batch + head * g_head
    d_scores += piece * CHUNK * CHUNK
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = chunk + sub * _SUB
    i = tl.arange(0, _SUB)
    same = _same_document(documents, first + i, first + i, tokens, HAS_DOCUMENTS)
    rows = (piece * CHUNK + sub * _SUB + i)[:, None] * DIM + columns[None, :]
    inside = (columns < DIM)[None, :] & (i >= 0)[:, None]
    mine = d_scores + sub * _SUB * (CHUNK + 1)
    if tl.program_id(0) % 2 == 0:
        own, into = _diagonal_dq(k, g, mine, same, first, columns, k_token, g_token, tokens, DIM, CHUNK, BLOCK, ACC)
        pairs = _pair_dq(
            k, g, d_scores, documents, sub, chunk, columns, k_token, g_token, tokens,
            DIM, CHUNK, BLOCK, HAS_DOCUMENTS, ACC,
        )  # fmt: skip
        tl.store(dq + rows, (own + pairs * into).to(dq.dtype.element_ty), mask=inside)
    else:
        own, out = _diagonal_dk(q, g, mine, same, first, columns, q_token, g_token, tokens, DIM, CHUNK, BLOCK, ACC)
        pairs = _pair_dk(
            q, g, d_scores, documents, sub, chunk, columns, q_token, g_token, tokens,
            DIM, CHUNK, BLOCK, HAS_DOCUMENTS, ACC,
        )  # fmt: skip
        tl.store(dk + rows, (own + pairs * out).to(dk.dtype.element_ty), mask=inside)
