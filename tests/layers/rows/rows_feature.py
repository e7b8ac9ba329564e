"""The battery's rows of ``catalog_feature``: small layers and their oracles."""

import math
from functools import partial

from seqpar.layers.linear.aaren import Aaren
from seqpar.layers.linear.based import Based
from seqpar.layers.linear.jrt import JRT
from seqpar.layers.linear.lightnet import LightNet
from seqpar.layers.linear.md_position import MDTPE
from tests.layers.oracles import oracles_feature
from tests.layers.rows.row import Row

_FIRST_3 = partial(oracles_feature.jrt_layer, prefix=3)
_FIRST_15 = partial(oracles_feature.jrt_layer, prefix=15)
_EMPTY, _ONE = -math.inf, 0.0

ROWS: dict[str, Row] = {
    "based": Row("based", lambda: Based(8, 2, feature_dim=3), oracles_feature.based_layer, dim=8),
    "jrt": Row("jrt", lambda: JRT(8, 2, prefix=15, feature_dim=3), _FIRST_15, dim=8),
    "jrt, tied, short prefix": Row("jrt", lambda: JRT(8, 2, prefix=3, tied=True, feature_dim=2), _FIRST_3, dim=8),
    "lightnet": Row("lightnet", lambda: LightNet(8, 2), partial(oracles_feature.lightnet_layer, start=_EMPTY), dim=8),
    "lightnet, one": Row(
        "lightnet",
        lambda: LightNet(8, 2, start="one", key_dim=3, value_dim=5, gate_rank=2),
        partial(oracles_feature.lightnet_layer, start=_ONE),
        dim=8,
    ),
    "lightnet, grid": Row(
        "lightnet",
        lambda: LightNet(8, 2, width=3, key_dim=3),
        partial(oracles_feature.lightnet_layer, start=_EMPTY),
        dim=8,
    ),
    "lightnet bidirectional": Row(
        "lightnet_bidirectional",
        lambda: LightNet(8, 2, causal=False),
        partial(oracles_feature.lightnet_of_documents, start=_EMPTY),
        dim=8,
    ),
    "lightnet bidirectional, one, grid": Row(
        "lightnet_bidirectional",
        lambda: LightNet(8, 2, causal=False, start="one", width=4),
        partial(oracles_feature.lightnet_of_documents, start=_ONE),
        dim=8,
    ),
    "md_tpe": Row("md_tpe", lambda: MDTPE(8, 2, width=4), oracles_feature.md_tpe_layer, dim=8),
    "md_tpe, wide": Row(
        "md_tpe", lambda: MDTPE(8, 2, width=11, key_dim=2), oracles_feature.md_tpe_layer, dim=8, remembers=False
    ),
    "aaren": Row("aaren", lambda: Aaren(8, 2), oracles_feature.aaren_layer, dim=8),
    "aaren, other dims": Row("aaren", lambda: Aaren(8, 2, key_dim=3, value_dim=5), oracles_feature.aaren_layer, dim=8),
}
