"""The rows of the catalog of recurrent networks: the state itself travels."""

from collections.abc import Callable

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.recurrent.recurrent import GRU, LSTM, SLSTM, Elman
from seqpar.layers.recurrent.recurrent_layer import LeakyCell, RecurrentLayer

CROSSES = "one state, unless a document starts at the cut"
SCANS = ()  # no ways through a state compose


def _states(count: int) -> Callable[[Sizes, int], int]:
    """So many numbers per channel."""
    return lambda sizes, tokens: count * FLOAT_BYTES * sizes.dim


ENTRIES = (
    Entry(
        "elman", "Elman", "Elman 1990; heads, arXiv 2412.07752", CROSSES,
        lambda sizes: Elman(sizes.dim, sizes.heads), _states(1), scans=SCANS,
    ),
    Entry(
        "gru", "GRU", "arXiv 1406.1078; heads, 2412.07752", CROSSES,
        lambda sizes: GRU(sizes.dim, sizes.heads), _states(1), scans=SCANS,
    ),
    Entry(
        "lstm", "LSTM", "Hochreiter and Schmidhuber 1997; heads, arXiv 2412.07752", CROSSES,
        lambda sizes: LSTM(sizes.dim, sizes.heads), _states(2), scans=SCANS,
    ),
    Entry(
        "slstm", "SLSTM", "arXiv 2405.04517", CROSSES,
        lambda sizes: SLSTM(sizes.dim, sizes.heads), _states(4), scans=SCANS,
    ),
    Entry(
        "slstm_bidirectional", "SLSTM", "arXiv 2405.04517", "one state each way",
        lambda sizes: SLSTM(sizes.dim, sizes.heads, bidirectional=True), _states(8), scans=SCANS, causal=False,
    ),
    Entry(
        "leaky", "RecurrentLayer", "an example of a cell of one's own", CROSSES,
        lambda sizes: RecurrentLayer(LeakyCell(sizes.dim)), _states(1), scans=SCANS,
    ),
)  # fmt: skip
