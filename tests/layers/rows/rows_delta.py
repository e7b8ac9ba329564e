"""The battery's rows of ``catalog_delta``: small layers and their oracles."""

from functools import partial
from typing import TypeVar

from seqpar.layers.delta.deltanet import DeltaNet
from seqpar.layers.delta.gated_deltanet import GatedDeltaNet
from seqpar.layers.delta.kda import KDA
from seqpar.layers.delta.mom import MoM
from tests.layers.oracles import oracles_delta
from tests.layers.rows.row import Row

Gated = TypeVar("Gated", GatedDeltaNet, KDA, MoM)


def remembering(layer: Gated, steps: float = -1.0) -> Gated:
    """The layer with decays of 0.95 to 0.99 (softplus(-1) is 0.3)."""
    layer.dt_bias.data.fill_(steps)
    layer.log_a.data.uniform_(-3.5, -2.0)
    return layer


ROWS: dict[str, Row] = {
    "deltanet": Row(
        "deltanet",
        lambda: DeltaNet(8, 2, key_dim=3, value_dim=5),
        partial(oracles_delta.deltanet_layer, heads=2),
        dim=8,
    ),
    "deltanet, negative eigenvalues": Row(
        "deltanet",
        lambda: DeltaNet(8, 2, width=2, negative_eigenvalues=True),
        partial(oracles_delta.deltanet_layer, heads=2),
        dim=8,
    ),
    "gated deltanet": Row(
        "gated_deltanet",
        lambda: remembering(GatedDeltaNet(8, 2)),
        partial(oracles_delta.gated_deltanet_layer, heads=2),
        dim=8,
    ),
    "gated deltanet, grouped, negative eigenvalues": Row(
        "gated_deltanet",
        lambda: remembering(
            GatedDeltaNet(8, 2, value_heads=4, key_dim=4, expand_v=1, width=3, negative_eigenvalues=True)
        ),
        partial(oracles_delta.gated_deltanet_layer, heads=2),
        dim=8,
    ),
    "kda": Row(
        "kda", lambda: remembering(KDA(8, 2, key_dim=4, value_dim=3)), partial(oracles_delta.kda_layer, heads=2), dim=8
    ),
    "kda, bounded, negative eigenvalues": Row(
        "kda",
        lambda: KDA(8, 2, lower_bound=-0.1, negative_eigenvalues=True),
        partial(oracles_delta.kda_layer, heads=2),
        dim=8,
    ),
    "mom": Row("mom", lambda: remembering(MoM(8, 2, memories=3, key_dim=3)), oracles_delta.mom_layer, dim=8),
    "mom, gated": Row(
        "mom",
        lambda: remembering(MoM(8, 2, memories=2, top_k=1, update="gated")),
        oracles_delta.mom_layer,
        dim=8,
        nightly=True,
    ),
    "mom, linear": Row(
        "mom", lambda: MoM(8, 2, memories=2, top_k=1, update="linear"), oracles_delta.mom_layer, dim=8, nightly=True
    ),
    "mom, delta": Row(
        "mom", lambda: MoM(8, 2, memories=2, top_k=1, update="delta"), oracles_delta.mom_layer, dim=8, nightly=True
    ),
    "mom, one of two, none shared": Row(
        "mom",
        lambda: remembering(MoM(8, 2, memories=2, top_k=1, shared=False, expand_v=1, width=3)),
        oracles_delta.mom_layer,
        dim=8,
    ),
}
