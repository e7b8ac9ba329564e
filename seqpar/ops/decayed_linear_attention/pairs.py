"""Pairs of tokens inside chunks, for gates per key channel, in both directions.

Read from the last token, the decay from j back to i is that of the gates of i to j - 1: those of i + 1 to j if each
gate moves on by one token. So the scores of that direction are those of the other, with queries and keys
in each other's place.
"""

from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.decayed_linear_attention import vector
from seqpar.ops.decayed_linear_attention.chunks import Cut
from seqpar.ops.decayed_linear_attention.gates import Gates, documents_of
from seqpar.ops.decayed_linear_attention.launches import strides_of
from seqpar.ops.decayed_linear_attention.tiles import Tiles


def pair_scores(q: Tensor, k: Tensor, gates: Gates) -> Tensor:
    """Scores [b, h, n, C, C] with decay: rows are later tokens in the order of memory, columns earlier ones."""
    return vector.scores(*_scored(q, k, gates))


def pair_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], gates: Gates, tiles: Tiles, scale: float
) -> tuple[Tensor, Tensor]:
    """dq and dk [b, h, n, C, k] from pairs of different tokens, of q, k, v, d_o."""
    q, k, v, d_o = inputs
    later, earlier = (v, d_o) if gates.reverse else (d_o, v)
    d_scores = _products(later, earlier, gates, tiles, scale)
    d_later, d_earlier = vector.scores_backward(*_scored(q, k, gates), d_scores)
    return (d_earlier, d_later) if gates.reverse else (d_later, d_earlier)


def _scored(q: Tensor, k: Tensor, gates: Gates) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Cut]:
    """What the scores are made of, that of later tokens first."""
    assert gates.log_decay is not None
    cut, documents = Cut(gates.tokens, gates.chunk, gates.num_chunks, ()), documents_of(gates)
    if not gates.reverse:
        return q, k, gates.log_decay, documents, cut
    return k, q, gates.log_decay.roll(1, 1), documents, cut


def _products(later: Tensor, earlier: Tensor, gates: Gates, tiles: Tiles, scale: float) -> Tensor:
    """``scale later earlier'`` [b, h, n, C, C], strictly below the diagonal; tensors [b, t, h, v]."""
    from seqpar.ops.decayed_linear_attention import kernel_backward

    (b, t, h, dim_v), block = later.shape, tiles.gradient
    pairs = later.new_empty(b, h, gates.num_chunks, gates.chunk, gates.chunk)
    launch.launch(
        kernel_backward.pair_gradients_kernel,
        (b * gates.num_chunks * h,),
        *(later, earlier, pairs, *strides_of(later, earlier), t, gates.num_chunks, h, scale),
        *(dim_v, gates.chunk, block.v, tiles.precision),
        num_warps=block.warps,
        num_stages=1,
    )
    return pairs
