"""The rows of the catalog of linear time-invariant systems."""

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.ssm.lmu import LMU
from seqpar.layers.ssm.lmuformer import LMUFormer
from seqpar.layers.ssm.lssl import LSSL
from seqpar.layers.ssm.s4 import S4
from seqpar.layers.ssm.s4d import S4D


def _lmuformer_numbers(sizes: Sizes) -> int:
    """A memory; twice the sums of every batch norm; a row either way for every convolution, in the first block."""
    norms, convs = (5, 5) if sizes.layer == 0 else (1, 0)
    return sizes.dim * (1 + 4 * norms + 2 * convs)


ENTRIES = (
    Entry(
        "s4",
        "S4",
        "arXiv 2111.00396",
        "one state",
        lambda sizes: S4(sizes.dim),
        lambda sizes, tokens: FLOAT_BYTES * sizes.dim * 64,
    ),
    Entry(
        "s4_bidirectional",
        "S4",
        "arXiv 2111.00396",
        "one state each way",
        lambda sizes: S4(sizes.dim, bidirectional=True),
        lambda sizes, tokens: FLOAT_BYTES * 2 * sizes.dim * 64,
        causal=False,
    ),
    Entry(
        "s4d_bidirectional",
        "S4D",
        "arXiv 2206.11893",
        "one complex state each way",
        lambda sizes: S4D(sizes.dim, bidirectional=True),
        lambda sizes, tokens: FLOAT_BYTES * 2 * sizes.dim * 64,
        causal=False,
    ),
    Entry(
        "lssl",
        "LSSL",
        "arXiv 2110.13985",
        "one state",
        lambda sizes: LSSL(sizes.dim),
        lambda sizes, tokens: FLOAT_BYTES * sizes.dim * 64,
    ),
    Entry(
        "lmu",
        "LMU",
        "NeurIPS 2019; parallel, arXiv 2102.11417",
        "one memory",
        lambda sizes: LMU(sizes.dim),
        lambda sizes, tokens: FLOAT_BYTES * 256,
    ),
    Entry(
        "lmuformer",
        "LMUFormer",
        "arXiv 2402.04882",
        "one memory, the sums of batch norms, and one row either way for each convolution",
        lambda sizes: LMUFormer(sizes.dim, embeds=sizes.layer == 0),
        lambda sizes, tokens: FLOAT_BYTES * _lmuformer_numbers(sizes),
        causal=False,
    ),
)
