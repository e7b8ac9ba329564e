"""The rows of the catalog that scan elementwise: selective and gated state-space models."""

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.ssm.birdie import GatedSSM
from seqpar.layers.ssm.mamba import Mamba
from seqpar.layers.ssm.rg_lru import RGLRU
from seqpar.layers.ssm.s4d import S4D
from seqpar.layers.ssm.s5 import S5

COMPLEX_BYTES = 2 * FLOAT_BYTES


def _rg_lru_inner(sizes: Sizes) -> int:
    """4/3 of the width, rounded up to a multiple of the heads."""
    return -(-4 * sizes.dim // (3 * sizes.heads)) * sizes.heads


def _rows(tokens: int) -> int:
    """How many rows before a convolution of 4 tokens cross."""
    return min(3, tokens)


ENTRIES = (
    Entry(
        "mamba",
        "Mamba",
        "arXiv 2312.00752",
        "one state (and the sums of its steps, unless a chain carries it), and the last 3 rows before the convolution",
        lambda sizes: Mamba(sizes.dim),
        lambda sizes, tokens: FLOAT_BYTES * 2 * sizes.dim * (16 + _rows(tokens)),
        recalls=True,
    ),
    Entry(
        "s4d",
        "S4D",
        "arXiv 2206.11893",
        "one complex state",
        lambda sizes: S4D(sizes.dim),
        lambda sizes, tokens: COMPLEX_BYTES * sizes.dim * 32,
    ),
    Entry(
        "s5",
        "S5",
        "arXiv 2208.04933; resettable, 2303.03982",
        "one complex state",
        lambda sizes: S5(sizes.dim, state_dim=2 * sizes.dim, blocks=sizes.heads),
        lambda sizes, tokens: COMPLEX_BYTES * sizes.dim,
    ),
    Entry(
        "rg_lru",
        "RGLRU",
        "arXiv 2402.19427",
        "one state (and its decays, unless a chain carries it), and the last 3 rows before the convolution",
        lambda sizes: RGLRU(sizes.dim, sizes.heads),
        lambda sizes, tokens: FLOAT_BYTES * _rg_lru_inner(sizes) * (1 + _rows(tokens)),
    ),
    Entry(
        "birdie",
        "GatedSSM",
        "arXiv 2411.01030",
        "one state (and its decays, unless a chain carries it)",
        lambda sizes: GatedSSM(sizes.dim),
        lambda sizes, tokens: FLOAT_BYTES * sizes.dim,
    ),
    Entry(
        "birdie_prefix",
        "GatedSSM",
        "arXiv 2411.01030",
        "half a state each way (and its decays, unless a chain carries it)",
        lambda sizes: GatedSSM(sizes.dim, prefix=512),
        lambda sizes, tokens: FLOAT_BYTES * sizes.dim,
        causal=False,
    ),
)
