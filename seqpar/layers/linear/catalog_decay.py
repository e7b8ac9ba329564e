"""The rows of the catalog that are decayed linear attention: one state per head travels."""

from seqpar.crossing.attention import TRANSPORTS
from seqpar.layers.entry import FLOAT_BYTES, Entry, Sizes
from seqpar.layers.linear.gla import GLA
from seqpar.layers.linear.liger import Liger
from seqpar.layers.linear.lightning_attention import LightningAttention
from seqpar.layers.linear.linear_attention import LinearAttention
from seqpar.layers.linear.retention import Retention
from seqpar.layers.linear.transnormer import TransNormer
from seqpar.layers.ssm.mamba2 import Mamba2


def _square_states(sizes: Sizes, tokens: int) -> int:
    return FLOAT_BYTES * sizes.heads * sizes.head_dim**2


def _transnormer_state(sizes: Sizes, tokens: int) -> int:
    return _square_states(sizes, tokens) * (1 if sizes.layer else 2)  # positions make keys twice as wide


def _mamba2_head(sizes: Sizes) -> tuple[int, int]:
    """Head dim and state dim: the paper's 64 and 128 unless heads are narrower or do not divide so."""
    head_dim = 2 * sizes.head_dim
    head_dim = head_dim if head_dim % 64 else 64
    return head_dim, min(128, 2 * head_dim)


def _mamba2(sizes: Sizes) -> Mamba2:
    head_dim, state_dim = _mamba2_head(sizes)
    return Mamba2(sizes.dim, head_dim=head_dim, state_dim=state_dim)


def _mamba2_state_and_rows(sizes: Sizes, tokens: int) -> int:
    inner, state_dim = 2 * sizes.dim, _mamba2_head(sizes)[1]
    return FLOAT_BYTES * (inner * state_dim + min(3, tokens) * (inner + 2 * state_dim))


def _liger_state_and_window(sizes: Sizes, tokens: int) -> int:
    return _square_states(sizes, tokens) + FLOAT_BYTES * min(63, tokens) * 2 * sizes.dim


ENTRIES = (
    Entry(
        "linear_attention",
        "LinearAttention",
        "arXiv 2006.16236; LASP-2, 2502.07563",
        "one state",
        lambda sizes: LinearAttention(sizes.dim, sizes.heads),
        _square_states,
    ),
    Entry(
        "lightning_attention",
        "LightningAttention",
        "arXiv 2401.04658",
        "one state",
        lambda sizes: LightningAttention(sizes.dim, sizes.heads, layer=sizes.layer, layers=sizes.layers),
        _square_states,
    ),
    Entry(
        "retention",
        "Retention",
        "arXiv 2307.08621",
        "one state",
        lambda sizes: Retention(sizes.dim, sizes.heads),
        lambda sizes, tokens: 2 * _square_states(sizes, tokens),  # values are twice as wide
    ),
    Entry(
        "gla",
        "GLA",
        "arXiv 2312.06635",
        "one state (and its decays, unless a chain carries it)",
        lambda sizes: GLA(sizes.dim, sizes.heads),
        lambda sizes, tokens: _square_states(sizes, tokens) // 2,  # keys are half as wide
    ),
    Entry(
        "transnormer",
        "TransNormer",
        "arXiv 2307.14995",
        "one state",
        lambda sizes: TransNormer(sizes.dim, sizes.heads, layer=sizes.layer, layers=sizes.layers),
        _transnormer_state,
    ),
    Entry(
        "mamba2",
        "Mamba2",
        "arXiv 2405.21060",
        "one state (and its decays, unless a chain carries it), and the last 3 rows before the convolution",
        _mamba2,
        _mamba2_state_and_rows,
        recalls=True,
    ),
    Entry(
        "liger",
        "Liger",
        "arXiv 2503.01496",
        "one state (and its decays, unless a chain carries it), and the last 63 keys and values",
        lambda sizes: Liger(sizes.dim, sizes.heads),
        _liger_state_and_window,
        transports=TRANSPORTS,
    ),
)
