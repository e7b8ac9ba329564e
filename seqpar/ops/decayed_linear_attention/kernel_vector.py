"""Scores inside chunks under vector gates, and their gradients: Triton kernels.

A chunk is cut into sub-blocks of 16 tokens. Between two of them the decay from j to i is split at the first token of
i's sub-block: ``into[i]`` from there to i, ``out[j]`` from after j to there. Both are exp of sums of numbers <= 0, each
sum made as such, so nothing overflows and nothing cancels, and scores are a matmul (the secondary chunking of Yang et
al. 2023, arXiv:2312.06635). Inside a sub-block a decayed row takes in one more factor per step: products only, so an
exact zero stays one. Sums, factors and accumulators are fp32 (fp64 for fp64).
"""

import triton
import triton.language as tl

SUB = 16  # tokens of a sub-block, the least that matrix units take
_SUB = tl.constexpr(SUB)
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter multiplies the bits of bf16 as integers


@triton.jit
def _place(num_chunks, heads, CHUNK: tl.constexpr):
    """My sub-block: its number in the chunk, the chunk's first token, and sequence, head and chunk as one number."""
    program = tl.program_id(0)
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
def _product(a, b, total, ACC: tl.constexpr):
    """``total + a @ b``."""
    if _WIDEN:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _tile(x, first, stride, columns, tokens, DIM: tl.constexpr, ACC: tl.constexpr):
    """Rows ``first`` to ``first + 15`` of ``x``; beyond the last token and channel it is zero."""
    rows = first + tl.arange(0, _SUB)
    inside = (rows < tokens)[:, None] & (columns < DIM)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _row(x, row, stride, columns, tokens, DIM: tl.constexpr, ACC: tl.constexpr):
    """One row of ``x``, zero beyond the last token and channel."""
    inside = (columns < DIM) & (row < tokens)
    return tl.load(x + row.to(tl.int64) * stride + columns, mask=inside, other=0.0).to(ACC)


@triton.jit
def _sums_after(g, first, stride, columns, tokens, DIM: tl.constexpr, ACC: tl.constexpr):
    """Sums of the gates after each row up to the last of its sub-block."""
    rows = tl.arange(0, _SUB)
    inside = ((first + rows + 1 < tokens) & (rows + 1 < _SUB))[:, None] & (columns < DIM)[None, :]
    at = g + (first + rows + 1).to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.cumsum(tl.load(at, mask=inside, other=0.0).to(ACC), 0, reverse=True)


@triton.jit
def _same_document(documents, later, earlier, tokens, HAS_DOCUMENTS: tl.constexpr):
    """[16, 16]: are both tokens there, and in one document?"""
    i, j = later + tl.arange(0, _SUB), earlier + tl.arange(0, _SUB)
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
    """Scores inside one sub-block (entries with j > i are not meant), and its queries times ``into``."""
    i = tl.arange(0, _SUB)
    columns = tl.arange(0, BLOCK)
    scores = tl.zeros([_SUB, _SUB], ACC)
    decayed = _tile(q, first, q_stride, columns, tokens, DIM, ACC)
    for step in range(_SUB):
        j = _SUB - 1 - step
        key = _row(k, first + j, k_stride, columns, tokens, DIM, ACC)
        score = tl.sum(decayed * key[None, :], 1)
        scores = tl.where(i[None, :] == j, score[:, None], scores)
        factor = tl.exp(_row(g, first + j, g_stride, columns, tokens, DIM, ACC))
        decayed = tl.where(i[:, None] >= j, decayed * factor[None, :], decayed)
    return scores, decayed


@triton.jit
def _keys_after(
    k, g, earlier, between, k_stride, g_stride, columns, tokens, DIM: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The keys of a sub-block, decayed to its end and on by the sums ``between``; and those sums with its own."""
    gates = _sums_after(g, earlier, g_stride, columns, tokens, DIM, ACC) + between[None, :]
    keys = (_tile(k, earlier, k_stride, columns, tokens, DIM, ACC) * tl.exp(gates)).to(k.dtype.element_ty)
    return keys, between + tl.sum(_tile(g, earlier, g_stride, columns, tokens, DIM, ACC), 0)


@triton.jit
def scores_kernel(
    q, k, g, documents, scores,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head,
    tokens, num_chunks, heads,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """16 rows of the scores of one chunk: ``scores`` [b, h, n, C, C]. A block holds all channels."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    sub, chunk, piece, batch, head = _place(num_chunks, heads, CHUNK)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    g += batch * g_batch + head * g_head
    i, j = tl.arange(0, _SUB)[:, None], tl.arange(0, _SUB)[None, :]
    first = chunk + sub * _SUB
    rows = scores + piece * CHUNK * CHUNK + (sub * _SUB + i) * CHUNK
    dtype = scores.dtype.element_ty
    found, queries = _diagonal_scores(q, k, g, first, q_token, k_token, g_token, tokens, DIM, BLOCK, ACC)
    queries = queries.to(dtype)
    same = _same_document(documents, first, first, tokens, HAS_DOCUMENTS) & (i >= j)
    tl.store(rows + sub * _SUB + j, tl.where(same, found, 0.0).to(dtype))
    between = tl.zeros([BLOCK], ACC)
    columns = tl.arange(0, BLOCK)
    for step in range(sub):
        other = sub - 1 - step
        earlier = chunk + other * _SUB
        keys, between = _keys_after(k, g, earlier, between, k_token, g_token, columns, tokens, DIM, ACC)
        found = _product(queries, tl.trans(keys), tl.zeros([_SUB, _SUB], ACC), ACC)
        same = _same_document(documents, first, earlier, tokens, HAS_DOCUMENTS)
        tl.store(rows + other * _SUB + j, tl.where(same, found, 0.0).to(dtype))
    for other in range(sub + 1, CHUNK // _SUB):
        tl.store(rows + other * _SUB + j, tl.zeros([_SUB, _SUB], dtype))


@triton.jit
def _diagonal_gradients(
    q, k, g, d_scores, documents, first, columns, q_stride, k_stride, g_stride, tokens,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the pairs inside one sub-block give to dq and dk, and its decays ``into`` and to its end.

    ``d_scores`` points at its first row and column.
    """
    rows = tl.arange(0, _SUB)
    dq = tl.zeros([_SUB, BLOCK], ACC)
    dk = tl.zeros([_SUB, BLOCK], ACC)
    mine = rows
    if HAS_DOCUMENTS:
        mine = tl.load(documents + first + rows, mask=first + rows < tokens, other=-1)
    into = tl.full([_SUB, BLOCK], 1.0, ACC)  # from j, ever earlier, to each row
    for step in range(_SUB):
        j = _SUB - 1 - step
        seen = (rows >= j) & (first + rows < tokens)
        if HAS_DOCUMENTS:
            seen = seen & (mine == tl.load(documents + first + j, mask=first + j < tokens, other=-1))
        gradient = tl.load(d_scores + rows * CHUNK + j, mask=seen, other=0.0).to(ACC)
        key = _row(k, first + j, k_stride, columns, tokens, DIM, ACC)
        dq += gradient[:, None] * (into * key[None, :])
        factor = tl.exp(_row(g, first + j, g_stride, columns, tokens, DIM, ACC))
        into = tl.where((rows >= j)[:, None], into * factor[None, :], into)
    out = tl.full([_SUB, BLOCK], 1.0, ACC)  # from each row to i, ever later
    for i in range(_SUB):
        seen = (rows <= i) & (first + i < tokens)
        if HAS_DOCUMENTS:
            seen = seen & (mine == tl.load(documents + first + i, mask=first + i < tokens, other=-2))
        gradient = tl.load(d_scores + i * CHUNK + rows, mask=seen, other=0.0).to(ACC)
        factor = tl.exp(_row(g, first + i, g_stride, columns, tokens, DIM, ACC))
        out = tl.where((rows < i)[:, None], out * factor[None, :], out)
        query = _row(q, first + i, q_stride, columns, tokens, DIM, ACC)
        dk += gradient[:, None] * (out * query[None, :])
    return dq, dk, into, out


@triton.jit
def _pair_dq(
    k, g, d_scores, documents, sub, chunk, columns, k_stride, g_stride, tokens,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What earlier sub-blocks give to dq of sub-block ``sub``, before ``into``; ``d_scores`` points at its chunk."""
    i, j = tl.arange(0, _SUB)[:, None], tl.arange(0, _SUB)[None, :]
    first = chunk + sub * _SUB
    dq = tl.zeros([_SUB, BLOCK], ACC)
    between = tl.zeros([BLOCK], ACC)
    for step in range(sub):
        other = sub - 1 - step
        earlier = chunk + other * _SUB
        same = _same_document(documents, first, earlier, tokens, HAS_DOCUMENTS)
        gradient = tl.load(d_scores + (sub * _SUB + i) * CHUNK + other * _SUB + j, mask=same, other=0.0)
        keys, between = _keys_after(k, g, earlier, between, k_stride, g_stride, columns, tokens, DIM, ACC)
        dq = _product(gradient.to(keys.dtype), keys, dq, ACC)
    return dq


@triton.jit
def _pair_dk(
    q, g, d_scores, documents, sub, chunk, columns, q_stride, g_stride, tokens,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What later sub-blocks give to dk of sub-block ``sub``, before the decay to its end."""
    i, j = tl.arange(0, _SUB)[:, None], tl.arange(0, _SUB)[None, :]
    first = chunk + sub * _SUB
    dk = tl.zeros([_SUB, BLOCK], ACC)
    between = tl.zeros([BLOCK], ACC)
    for other in range(sub + 1, CHUNK // _SUB):
        later = chunk + other * _SUB
        same = _same_document(documents, later, first, tokens, HAS_DOCUMENTS)
        gradient = tl.load(d_scores + (other * _SUB + i) * CHUNK + sub * _SUB + j, mask=same, other=0.0)
        gates = _tile(g, later, g_stride, columns, tokens, DIM, ACC)
        into = tl.exp(tl.cumsum(gates, 0) + between[None, :])
        queries = (_tile(q, later, q_stride, columns, tokens, DIM, ACC) * into).to(q.dtype.element_ty)
        dk = _product(tl.trans(gradient.to(queries.dtype)), queries, dk, ACC)
        between += tl.sum(gates, 0)
    return dk


@triton.jit
def scores_backward_kernel(
    q, k, g, documents, d_scores, dq, dk,
    q_batch, q_token, q_head, k_batch, k_token, k_head, g_batch, g_token, g_head,
    tokens, num_chunks, heads,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """16 rows of dq and dk [b, h, n, C, k] of one block of channels, from ``d_scores`` [b, h, n, C, C]."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    sub, chunk, piece, batch, head = _place(num_chunks, heads, CHUNK)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    g += batch * g_batch + head * g_head
    d_scores += piece * CHUNK * CHUNK
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = chunk + sub * _SUB
    own_q, own_k, into, out = _diagonal_gradients(
        q, k, g, d_scores + sub * _SUB * (CHUNK + 1), documents, first, columns, q_token, k_token, g_token, tokens,
        DIM, CHUNK, BLOCK, HAS_DOCUMENTS, ACC,
    )  # fmt: skip
    rows = (piece * CHUNK + sub * _SUB + tl.arange(0, _SUB))[:, None] * DIM + columns[None, :]
    inside = (columns < DIM)[None, :] & (tl.arange(0, _SUB) >= 0)[:, None]
    pairs = _pair_dq(
        k, g, d_scores, documents, sub, chunk, columns, k_token, g_token, tokens, DIM, CHUNK, BLOCK, HAS_DOCUMENTS, ACC
    )
    tl.store(dq + rows, (own_q + pairs * into).to(dq.dtype.element_ty), mask=inside)
    pairs = _pair_dk(
        q, g, d_scores, documents, sub, chunk, columns, q_token, g_token, tokens, DIM, CHUNK, BLOCK, HAS_DOCUMENTS, ACC
    )
    tl.store(dk + rows, (own_k + pairs * out).to(dk.dtype.element_ty), mask=inside)
