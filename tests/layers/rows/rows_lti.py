"""The battery's rows of ``catalog_lti``: small layers and their oracles."""

from functools import partial

from seqpar.layers.ssm.lmu import LMU
from seqpar.layers.ssm.lmuformer import LMUFormer
from seqpar.layers.ssm.lssl import LSSL
from seqpar.layers.ssm.s4 import S4
from seqpar.layers.ssm.s4d import S4D
from tests.layers.oracles import oracles_lti
from tests.layers.rows.row import Row


def _of_steps(layer: S4 | S4D | LSSL, low: float, high: float) -> S4 | S4D | LSSL:
    """One whose steps are so large that what it does over thirty tokens can be seen."""
    layer.log_step.data.uniform_(low, high).log_()
    return layer


ROWS: dict[str, Row] = {
    "s4": Row(
        "s4", lambda: _of_steps(S4(3, state_dim=4), 0.05, 0.3), partial(oracles_lti.s4_layer, rule="bilinear"), 3
    ),
    "s4, held, untied": Row(
        "s4",
        lambda: _of_steps(S4(3, state_dim=6, sampling="zoh", tied=False), 0.05, 0.2),
        partial(oracles_lti.s4_layer, rule="zoh"),
        3,
    ),
    "s4, both ways": Row(
        "s4_bidirectional",
        lambda: _of_steps(S4(3, state_dim=4, bidirectional=True), 0.05, 0.3),
        partial(oracles_lti.s4_layer, rule="bilinear"),
        3,
    ),
    "s4d, both ways": Row(
        "s4d_bidirectional",
        lambda: _of_steps(S4D(3, state_dim=4, bidirectional=True), 0.05, 0.3),
        oracles_lti.s4d_both_ways,
        3,
        nightly=True,
    ),
    "lssl": Row("lssl", lambda: _of_steps(LSSL(3, state_dim=5), 0.05, 0.3), oracles_lti.lssl_layer, 3),
    "lssl, two channels": Row(
        "lssl", lambda: _of_steps(LSSL(3, state_dim=4, channels=2), 0.05, 0.2), oracles_lti.lssl_layer, 3
    ),
    "lmu": Row("lmu", lambda: LMU(6, memory_dim=7, theta=20), partial(oracles_lti.lmu_layer, size=7, theta=20), 6),
    "lmu, short": Row(
        "lmu", lambda: LMU(4, memory_dim=3, theta=6.5), partial(oracles_lti.lmu_layer, size=3, theta=6.5), 4, False
    ),
    "lmuformer": Row(
        "lmuformer",
        lambda: LMUFormer(5, memory_dim=4, theta=20),
        partial(oracles_lti.lmuformer_layer, size=4, theta=20),
        5,
    ),
    "lmuformer, a later block": Row(
        "lmuformer",
        lambda: LMUFormer(6, theta=20, embeds=False),
        partial(oracles_lti.lmuformer_layer, size=6, theta=20),
        6,
    ),
}
