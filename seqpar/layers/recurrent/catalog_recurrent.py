"""The rows of the catalog of recurrent networks: the state itself travels."""

from collections.abc import Callable

from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.recurrent.recurrent import GRU, LSTM, SLSTM, Elman
from seqpar.layers.recurrent.recurrent_layer import LeakyCell, RecurrentLayer
from seqpar.layers.recurrent.spiking import LIF, SpikingLMUFormer

CROSSES = "one state, unless a document starts at the cut"
SCANS = ()  # no ways through a state compose


def _states(count: int) -> Callable[[Sizes, int], int]:
    """So many numbers per channel."""
    return lambda sizes, tokens: count * FLOAT_BYTES * sizes.dim


def _spiking_numbers(sizes: Sizes, tokens: int) -> int:
    """What an LMUFormer sends, and a potential per neuron: one at the memory's input, else as many as channels."""
    norms, convs, neurons = (5, 5, 6) if sizes.layer == 0 else (1, 0, 2)
    return FLOAT_BYTES * (1 + sizes.dim * (1 + 4 * norms + 2 * convs + neurons))


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
    Entry(
        "lif", "LIF", "spiking neurons; arXiv 2402.04882", CROSSES, lambda sizes: LIF(sizes.dim), _states(1),
        scans=SCANS,
    ),
    Entry(
        "spiking_lmuformer", "SpikingLMUFormer", "arXiv 2402.04882",
        "what an LMUFormer sends, and a potential per neuron",
        lambda sizes: SpikingLMUFormer(sizes.dim, embeds=sizes.layer == 0), _spiking_numbers, causal=False,
    ),
)  # fmt: skip
