"""The rows of the catalog that look at neighbours, grids, projections or pools."""

from typing import NoReturn

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.local.bmojo_f import BMojoF
from seqpar.layers.local.convolution import ShortConvolution
from seqpar.layers.local.gam import GAM
from seqpar.layers.local.linformer import Linformer
from seqpar.layers.local.token_shift import TokenShift
from seqpar.layers.local.vig import ViG

GRID_WIDTH = 16  # patches in a row of an image of 256 pixels, as ViG cuts them
PROJECTED = 256
# Of MemMamba's pool its sizes are known (50 summaries of 64 numbers, kept by score), but not what a summary is made of,
# what reads the pool and how that joins Mamba's output; whether scores read the state decides if it can be cut at all.
NO_MEMMAMBA = "not built: its equations were not at hand"


def _rows_before(width: int, sizes: Sizes, tokens: int) -> int:
    """The rows that a causal convolution of ``width`` tokens misses."""
    return FLOAT_BYTES * sizes.dim * min(width - 1, tokens)


def _vig_states_and_rows(sizes: Sizes, tokens: int) -> int:
    """Two states, and rows both ways: one more where a cut goes through a row of the grid."""
    states = 2 * sizes.heads * max(1, sizes.head_dim // 2) * sizes.head_dim
    rows = min(tokens, GRID_WIDTH + (tokens % GRID_WIDTH > 0))
    return FLOAT_BYTES * (states + 2 * rows * sizes.dim)


def _bmojo_state_and_rows(sizes: Sizes, tokens: int) -> int:
    """Mamba-2's state and rows, and keys and values of two kinds of the last 127 tokens."""
    inner, state_dim = 2 * sizes.dim, min(128, 4 * sizes.head_dim)
    memory = inner * state_dim + min(3, tokens) * (inner + 2 * state_dim)
    return FLOAT_BYTES * (memory + min(127, tokens) * 4 * sizes.dim)


def _no_memmamba(sizes: Sizes, tokens: int = 0) -> NoReturn:
    raise ValueError(f"memmamba is {NO_MEMMAMBA}")


ENTRIES = (
    Entry(
        "short_convolution",
        "ShortConvolution",
        "arXiv 2212.14052",
        "the last 3 rows",
        lambda sizes: ShortConvolution(sizes.dim, silu=True),
        lambda sizes, tokens: _rows_before(4, sizes, tokens),
        scans=(),
    ),
    Entry(
        "token_shift",
        "TokenShift",
        "arXiv 2305.13048",
        "the last row",
        lambda sizes: TokenShift(sizes.dim),
        lambda sizes, tokens: _rows_before(2, sizes, tokens),
        scans=(),
    ),
    Entry(
        "gam",
        "GAM",
        "arXiv 2509.00605",
        "the last 2 rows",
        lambda sizes: GAM(sizes.dim),
        lambda sizes, tokens: _rows_before(3, sizes, tokens),
        scans=(),
    ),
    Entry(
        "vig",
        "ViG",
        "arXiv 2405.18425",
        f"a state each way (and its decays, unless a chain carries it), and {GRID_WIDTH + 1} rows either way",
        lambda sizes: ViG(sizes.dim, sizes.heads, width=GRID_WIDTH),
        _vig_states_and_rows,
        causal=False,
    ),
    Entry(
        "linformer",
        "Linformer",
        "arXiv 2006.04768; cut, 2105.13120",
        f"the sums of {PROJECTED} projected keys and values, each way",
        lambda sizes: Linformer(sizes.dim, sizes.heads, projected=PROJECTED),
        lambda sizes, tokens: 2 * FLOAT_BYTES * 2 * PROJECTED * sizes.dim,
        scans=(),
        causal=False,
    ),
    Entry(
        "bmojo_f",
        "BMojoF",
        "arXiv 2407.06324",
        "one state (and its decays, unless a chain carries it), the last 3 rows before the convolution, and the last "
        "127 keys and values of two kinds",
        lambda sizes: BMojoF(sizes.dim, sizes.heads),
        _bmojo_state_and_rows,
        recalls=True,
    ),
    Entry(
        "memmamba",
        "MemMamba",
        "arXiv 2510.03279",
        "a pool of summaries, if scores do not read the state",
        _no_memmamba,
        _no_memmamba,
        scans=(),
        status=NO_MEMMAMBA,
    ),
)
