"""The rows of the catalog that are decayed linear attention: one state per head travels."""

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.gla import GLA
from seqpar.layers.lightning_attention import LightningAttention
from seqpar.layers.linear_attention import LinearAttention
from seqpar.layers.retention import Retention


def _square_states(sizes: Sizes, tokens: int) -> int:
    return FLOAT_BYTES * sizes.heads * sizes.head_dim**2


ENTRIES = (
    Entry(
        "linear_attention",
        "LinearAttention",
        "arXiv 2006.16236; LASP-2, 2502.07563",
        "one state",
        lambda sizes: LinearAttention(sizes.dim, sizes.heads),
        _square_states,
    ),
    Entry(
        "lightning_attention",
        "LightningAttention",
        "arXiv 2401.04658",
        "one state",
        lambda sizes: LightningAttention(sizes.dim, sizes.heads, layer=sizes.layer, layers=sizes.layers),
        _square_states,
    ),
    Entry(
        "retention",
        "Retention",
        "arXiv 2307.08621",
        "one state",
        lambda sizes: Retention(sizes.dim, sizes.heads),
        lambda sizes, tokens: 2 * _square_states(sizes, tokens),  # values are twice as wide
    ),
    Entry(
        "gla",
        "GLA",
        "arXiv 2312.06635",
        "one state (and its decays, unless a chain carries it)",
        lambda sizes: GLA(sizes.dim, sizes.heads),
        lambda sizes, tokens: _square_states(sizes, tokens) // 2,  # keys are half as wide
    ),
)
