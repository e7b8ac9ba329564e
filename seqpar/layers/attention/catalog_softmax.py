"""The rows of the catalog whose keys and values travel."""

from seqpar.crossing.attention import TRANSPORTS
from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes


def _keys_and_values(sizes: Sizes, tokens: int) -> int:
    return FLOAT_BYTES * tokens * 2 * sizes.dim


ENTRIES = (
    Entry(
        "softmax",
        "SoftmaxAttention",
        "arXiv 1706.03762; grouped queries 2305.13245, rotary positions 2104.09864",
        "keys and values",
        lambda sizes: SoftmaxAttention(sizes.dim, sizes.heads),
        _keys_and_values,
        transports=TRANSPORTS,
        scans=(),
        recalls=True,
    ),
)
