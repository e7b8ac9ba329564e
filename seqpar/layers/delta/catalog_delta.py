"""The rows of the catalog of the delta rule: a state travels, and a matrix, unless a chain carries the state."""

from seqpar.layers.delta.deltanet import DeltaNet
from seqpar.layers.delta.gated_deltanet import GatedDeltaNet
from seqpar.layers.delta.kda import KDA
from seqpar.layers.delta.mom import MoM
from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes

CROSSES = "one state (and a matrix, unless a chain carries it), and the last 3 rows before the convolution"


def _rows(tokens: int) -> int:
    """How many rows before a convolution of 4 tokens cross."""
    return min(3, tokens)


def _square_states_and_rows(sizes: Sizes, tokens: int) -> int:
    return FLOAT_BYTES * (sizes.heads * sizes.head_dim**2 + _rows(tokens) * 3 * sizes.dim)


def _wide_states_and_rows(sizes: Sizes, tokens: int) -> int:
    key_dim = max(1, 3 * sizes.dim // (4 * sizes.heads))
    return FLOAT_BYTES * sizes.heads * (2 * key_dim**2 + _rows(tokens) * 4 * key_dim)


def _memories_rows_and_choices(sizes: Sizes, tokens: int) -> int:
    """With the default four memories and the shared one; a memory that got fewer than 3 tokens sends fewer rows."""
    key_dim = max(1, sizes.dim // (2 * sizes.heads))
    return 5 * FLOAT_BYTES * sizes.heads * (2 * key_dim**2 + _rows(tokens) * 4 * key_dim) + 2 * 2 * tokens


ENTRIES = (
    Entry(
        "deltanet",
        "DeltaNet",
        "arXiv 2406.06484; negative eigenvalues, 2411.12537",
        CROSSES,
        lambda sizes: DeltaNet(sizes.dim, sizes.heads),
        _square_states_and_rows,
        recalls=True,
    ),
    Entry(
        "gated_deltanet",
        "GatedDeltaNet",
        "arXiv 2412.06464",
        CROSSES,
        lambda sizes: GatedDeltaNet(sizes.dim, sizes.heads),
        _wide_states_and_rows,
        recalls=True,
    ),
    Entry(
        "kda",
        "KDA",
        "arXiv 2510.26692",
        CROSSES,
        lambda sizes: KDA(sizes.dim, sizes.heads),
        _square_states_and_rows,
        recalls=True,
    ),
    Entry(
        "mom",
        "MoM",
        "arXiv 2502.13685",
        "the state of every memory (and a matrix each, unless a chain carries it), the last 3 rows of each before the "
        "convolution, and a byte per choice of a memory",
        lambda sizes: MoM(sizes.dim, sizes.heads),
        _memories_rows_and_choices,
        recalls=True,
    ),
)
