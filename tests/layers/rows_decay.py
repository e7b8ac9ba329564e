"""The battery's rows of ``catalog_softmax`` and ``catalog_decay``: small layers and their oracles."""

from functools import partial

from seqpar.layers import GLA, LightningAttention, LinearAttention, Retention, SoftmaxAttention
from tests.layers import mixers
from tests.layers.row import Row

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
}
