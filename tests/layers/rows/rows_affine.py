"""The battery's rows of ``catalog_affine``: small layers and their oracles."""

from seqpar.layers.linear.liger import Liger
from seqpar.layers.linear.mlstm import MLSTM
from seqpar.layers.linear.performer import Performer
from tests.layers.oracles import oracles_affine, oracles_decay
from tests.layers.rows.row import Row


def _open(layer: MLSTM) -> MLSTM:
    """One that lets tokens in."""
    layer.gates.bias.data[: layer.heads] = 0.5
    return layer


ROWS: dict[str, Row] = {
    "mlstm": Row("mlstm", lambda: _open(MLSTM(8, 2)), oracles_affine.mlstm_layer, dim=8),
    "mlstm, nearly shut": Row(
        "mlstm", lambda: MLSTM(8, 2, key_dim=3, value_dim=5), oracles_affine.mlstm_layer, dim=8, nightly=True
    ),
    "performer": Row("performer", lambda: Performer(8, 2, features=7), oracles_affine.performer_layer, dim=8),
    "liger, hgrn2": Row("liger_hgrn2", lambda: Liger(8, 2, window=4, form="hgrn2"), oracles_decay.liger_layer, dim=8),
    "liger, slots, grouped": Row(
        "liger_gsa",
        lambda: Liger(8, 4, kv_heads=2, key_dim=3, value_dim=2, window=4, rope_base=None, form="gsa"),
        oracles_decay.liger_layer,
        dim=8,
    ),
}
