"""The rows of the catalog whose features, normalisers or prefixes make more of linear attention."""

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.linear.aaren import Aaren
from seqpar.layers.linear.based import Based, taylor_dim
from seqpar.layers.linear.jrt import JRT
from seqpar.layers.linear.lightnet import LightNet
from seqpar.layers.linear.md_position import MDTPE

FEATURES = taylor_dim(16)
GRID = 16  # columns


def _taylor_state(sizes: Sizes, tokens: int) -> int:
    return FLOAT_BYTES * sizes.heads * FEATURES * (sizes.head_dim + 1)


def _rows_with_sums(sizes: Sizes, width: int) -> int:
    """A state of rows of ``width`` channels, for each of which a number or two travel, too."""
    return FLOAT_BYTES * sizes.heads * sizes.head_dim * width


def _row_state_and_columns(sizes: Sizes, tokens: int) -> int:
    """A state if a row is cut, and the tokens of every column that are not where it is dealt to, there and back."""
    leaving, before = 0, 0
    for column in range(min(GRID, 2 * tokens)):
        first, both = (len(range(column, stop, GRID)) for stop in (tokens, 2 * tokens))
        leaving += both - first if before < tokens else first
        before += both
    state = sizes.heads * sizes.head_dim**2 if tokens % GRID else 0
    return FLOAT_BYTES * (state + 2 * leaving * sizes.dim)


ENTRIES: tuple[Entry, ...] = (
    Entry(
        "based",
        "Based",
        "arXiv 2402.18668",
        "one state of 153 features, its normaliser in it",
        lambda sizes: Based(sizes.dim, sizes.heads),
        _taylor_state,
        recalls=True,
    ),
    Entry(
        "jrt",
        "JRT",
        "arXiv 2407.05483",
        "one state of 153 features; those of the prefix are summed over ranks",
        lambda sizes: JRT(sizes.dim, sizes.heads),
        lambda sizes, tokens: 3 * _taylor_state(sizes, tokens),  # a sum over two ranks is a message each way
        causal=False,
        recalls=True,
    ),
    Entry(
        "lightnet",
        "LightNet",
        "arXiv 2405.21022",
        "one state, a sum and a maximum for each of its rows (and its decays, unless a chain carries it)",
        lambda sizes: LightNet(sizes.dim, sizes.heads),
        lambda sizes, tokens: _rows_with_sums(sizes, sizes.head_dim + 2),
    ),
    Entry(
        "lightnet_bidirectional",
        "LightNet",
        "arXiv 2405.21022",
        "a state and its normalisers are summed over ranks; a maximum for each of its rows",
        lambda sizes: LightNet(sizes.dim, sizes.heads, causal=False),
        lambda sizes, tokens: 2 * _rows_with_sums(sizes, sizes.head_dim + 2),
        scans=(),
        causal=False,
    ),
    Entry(
        "md_tpe",
        "MDTPE",
        "arXiv 2405.21022",
        "a state inside a row; for columns, tokens change places, there and back",
        lambda sizes: MDTPE(sizes.dim, sizes.heads, width=GRID),
        _row_state_and_columns,
        causal=False,  # for images: it keeps no states
    ),
    Entry(
        "aaren",
        "Aaren",
        "arXiv 2405.13956",
        "one row of values, a sum and a maximum per head (and its decays, unless a chain carries it)",
        lambda sizes: Aaren(sizes.dim, sizes.heads),
        lambda sizes, tokens: FLOAT_BYTES * sizes.heads * (sizes.head_dim + 2),
    ),
)
