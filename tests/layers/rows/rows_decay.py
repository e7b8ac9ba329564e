"""The battery's rows of ``catalog_softmax`` and ``catalog_decay``: small layers and their oracles."""

from functools import partial
from typing import Any

from seqpar.layers import GLA, LightningAttention, LinearAttention, Retention, SoftmaxAttention
from seqpar.layers.linear.liger import Liger
from seqpar.layers.linear.transnormer import TransNormer
from seqpar.layers.ssm.mamba2 import Mamba2
from tests.layers import mixers
from tests.layers.oracles import oracles_decay
from tests.layers.rows.row import Row


def _mamba2(dim: int, **sizes: Any) -> Mamba2:
    """One that remembers: its steps are 0.3, its decays 0.95 to 0.99."""
    layer = Mamba2(dim, **sizes)
    layer.dt_bias.data.fill_(-1.0)
    layer.log_a.data.uniform_(-3.5, -2.0)
    return layer


ROWS: dict[str, Row] = {
    "softmax": Row("softmax", lambda: SoftmaxAttention(16, 4), mixers.softmax_attention_layer),
    "softmax, grouped, window": Row(
        "softmax",
        lambda: SoftmaxAttention(16, 4, kv_heads=2, window=3, key_dim=6, value_dim=5),
        mixers.softmax_attention_layer,
        remembers=False,
    ),
    "linear attention": Row(
        "linear_attention", lambda: LinearAttention(16, 2, key_dim=3, value_dim=5), mixers.linear_attention_layer
    ),
    "lightning attention": Row(
        "lightning_attention",
        lambda: LightningAttention(16, 2, layer=1, layers=3, value_dim=6),
        partial(mixers.lightning_attention_layer, slopes=[0.0625 * 0.50001, 0.00390625 * 0.50001]),
    ),
    "retention": Row("retention", lambda: Retention(16, 4), mixers.retention_layer),
    "gla": Row("gla", lambda: GLA(16, 4), mixers.gla_layer),
    "transnormer": Row(
        "transnormer",
        lambda: TransNormer(8, 2, layers=4),
        partial(oracles_decay.transnormer_layer, slopes=[0.0, 4.0], positions=True),
        dim=8,
    ),
    "transnormer, alibi, fixed positions": Row(
        "transnormer",
        lambda: TransNormer(8, 2, layer=1, layers=3, slopes="alibi", positions="fixed", key_dim=3, value_dim=5),
        partial(oracles_decay.transnormer_layer, slopes=[0.0625 * 0.50001, 0.00390625 * 0.50001], positions=True),
        dim=8,
    ),
    "transnormer, later layer": Row(
        "transnormer",
        lambda: TransNormer(8, 2, layer=3, layers=4),
        partial(oracles_decay.transnormer_layer, slopes=[0.0, 1.0], positions=False),
        dim=8,
    ),
    "mamba2": Row("mamba2", lambda: _mamba2(8, head_dim=8, state_dim=5), oracles_decay.mamba2_layer, dim=8),
    "mamba2, window of a difference": Row(
        "mamba2",
        lambda: _mamba2(8, head_dim=8, state_dim=5, window=6, step_scale=0.5, step_offset=0.02),
        oracles_decay.mamba2_layer,
        dim=8,
        remembers=False,
    ),
    "mamba2, bounded states": Row(
        "mamba2",
        lambda: _mamba2(8, head_dim=8, state_dim=5, state_bound=1.5),
        oracles_decay.mamba2_layer,
        dim=8,
        nightly=True,
    ),
    "mamba2, groups, width 2": Row(
        "mamba2",
        lambda: _mamba2(6, head_dim=3, state_dim=3, groups=2, width=2),
        oracles_decay.mamba2_layer,
        dim=6,
    ),
    "liger": Row("liger", lambda: Liger(8, 2, window=4), oracles_decay.liger_layer, dim=8),
    "liger, grouped, no positions": Row(
        "liger",
        lambda: Liger(8, 4, kv_heads=2, key_dim=3, value_dim=2, window=9, rope_base=None),
        oracles_decay.liger_layer,
        dim=8,
    ),
}
