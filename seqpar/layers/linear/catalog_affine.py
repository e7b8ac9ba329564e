"""The rows of the catalog that other memories than a key's and a value's are made of linear attention with."""

from seqpar.crossing.attention import TRANSPORTS
from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.linear.liger import Liger
from seqpar.layers.linear.mlstm import MLSTM
from seqpar.layers.linear.performer import Performer, default_features

WINDOW = "and the last 63 keys and values"


def _matrix_memory(sizes: Sizes, tokens: int) -> int:
    return FLOAT_BYTES * sizes.heads * max(1, sizes.head_dim // 2) * (sizes.head_dim + 1)


def _random_features(sizes: Sizes, tokens: int) -> int:
    return FLOAT_BYTES * sizes.heads * default_features(sizes.head_dim) * (sizes.head_dim + 1)


def _liger(sizes: Sizes, tokens: int, states: int) -> int:
    return FLOAT_BYTES * (states * sizes.heads * sizes.head_dim**2 + min(63, tokens) * 2 * sizes.dim)


ENTRIES = (
    Entry(
        "mlstm",
        "MLSTM",
        "arXiv 2405.04517; bounded gates, 2503.13427",
        "one state, its normaliser in it (and its decays, unless a chain carries it)",
        lambda sizes: MLSTM(sizes.dim, sizes.heads),
        _matrix_memory,
    ),
    Entry(
        "performer",
        "Performer",
        "arXiv 2009.14794",
        "one state of random features, its normaliser in it",
        lambda sizes: Performer(sizes.dim, sizes.heads),
        _random_features,
    ),
    Entry(
        "liger_hgrn2",
        "Liger",
        "arXiv 2503.01496; HGRN2, 2404.07904",
        f"one state (and its decays, unless a chain carries it), {WINDOW}",
        lambda sizes: Liger(sizes.dim, sizes.heads, form="hgrn2"),
        lambda sizes, tokens: _liger(sizes, tokens, 1),
        transports=TRANSPORTS,
    ),
    Entry(
        "liger_gsa",
        "Liger",
        "arXiv 2503.01496; gated slots, 2409.07146",
        f"two states (and their decays, unless a chain carries them), {WINDOW}",
        lambda sizes: Liger(sizes.dim, sizes.heads, form="gsa"),
        lambda sizes, tokens: _liger(sizes, tokens, 2),
        transports=TRANSPORTS,
    ),
)
