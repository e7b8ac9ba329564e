"""What a stack of layers costs to cut: the catalog's bytes as a shape that the planner prices."""

from seqpar.layers.catalog import find
from seqpar.layers.entry import Entry, Sizes
from seqpar.planner.problem.models import Decoder

FAR = 1 << 20  # tokens of a shard that no halo reaches over


def decoder_shape(pattern: str, repeats: int, dim: int, heads: int, ffn: int, vocabulary: int) -> Decoder:
    """The planner's view of a decoder of catalog rows, see :class:`seqpar.models.DecoderConfig`.

    Rows whose keys and values travel are its softmax layers; what all others send over a cut, together, its state.
    Raises ``ValueError`` for a row that is not in the catalog.
    """
    names = pattern.split() * repeats
    if not names:
        raise ValueError("a pattern must name at least one layer, such as 'gla gla gla softmax'")
    rows = [(find(name), Sizes(dim, heads, place, len(names))) for place, name in enumerate(names)]
    sent = sum(entry.bytes_per_cut(sizes, FAR) for entry, sizes in rows if not sends_tokens(entry, sizes))
    softmax = sum(sends_tokens(entry, sizes) for entry, sizes in rows)
    return Decoder(len(names), softmax, dim, heads, heads, dim // heads, ffn, vocabulary, float(sent))


def sends_tokens(entry: Entry, sizes: Sizes) -> bool:
    """Whether longer shards send more: the keys and values of all tokens."""
    return entry.bytes_per_cut(sizes, 2 * FAR) > entry.bytes_per_cut(sizes, FAR)
