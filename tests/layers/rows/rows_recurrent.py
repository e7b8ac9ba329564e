"""The battery's rows of ``catalog_recurrent``: small layers and their oracles."""

from functools import partial

from seqpar.layers.recurrent.recurrent import GRU, LSTM, SLSTM, Elman
from seqpar.layers.recurrent.recurrent_layer import LeakyCell, RecurrentLayer
from seqpar.layers.recurrent.spiking import LIF, SpikingLMUFormer
from tests.layers.oracles.oracles_recurrent import leaky_layer, lif_layer, recurrent_layer, spiking_layer
from tests.layers.rows.row import Row

ROWS: dict[str, Row] = {
    "elman": Row(
        "elman", lambda: Elman(6, 2), partial(recurrent_layer, kind="elman"), dim=6, nightly=True, remembers=False
    ),
    "gru": Row("gru", lambda: GRU(6, 2), partial(recurrent_layer, kind="gru"), dim=6, remembers=False),
    "lstm": Row("lstm", lambda: LSTM(6, 2), partial(recurrent_layer, kind="lstm"), dim=6),
    "lstm, one head, no norm, computed again": Row(
        "lstm",
        lambda: LSTM(4, 1, norm=False, recompute=True),
        partial(recurrent_layer, kind="lstm"),
        dim=4,
        nightly=True,
    ),
    "slstm": Row("slstm", lambda: SLSTM(6, 2), partial(recurrent_layer, kind="slstm"), dim=6),
    "lstm, over heads": Row(
        "lstm", lambda: LSTM(6, 2, transport="all_to_all"), partial(recurrent_layer, kind="lstm"), dim=6
    ),
    "slstm, both ways": Row(
        "slstm_bidirectional",
        lambda: SLSTM(6, 2, bidirectional=True),
        partial(recurrent_layer, kind="slstm"),
        dim=6,
    ),
    "slstm, both ways, over heads": Row(
        "slstm_bidirectional",
        lambda: SLSTM(4, 2, bidirectional=True, transport="all_to_all"),
        partial(recurrent_layer, kind="slstm"),
        dim=4,
        nightly=True,
    ),
    "lif": Row("lif", lambda: LIF(5, threshold=0.4), lif_layer, dim=5, remembers=False),
    "spiking lmuformer": Row(
        "spiking_lmuformer",
        lambda: SpikingLMUFormer(5, memory_dim=4, theta=20),
        partial(spiking_layer, size=4, theta=20),
        dim=5,
        nightly=True,
    ),
    "spiking lmuformer, a later block": Row(
        "spiking_lmuformer",
        lambda: SpikingLMUFormer(6, theta=20, embeds=False),
        partial(spiking_layer, size=6, theta=20),
        dim=6,
    ),
    "leaky": Row("leaky", lambda: RecurrentLayer(LeakyCell(5)), leaky_layer, dim=5),
}
