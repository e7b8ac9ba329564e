"""The battery's rows of ``catalog_local``: small layers and their oracles."""

from typing import Any

from seqpar.layers.local.bmojo_f import BMojoF
from seqpar.layers.local.convolution import ShortConvolution
from seqpar.layers.local.gam import GAM
from seqpar.layers.local.linformer import Linformer
from seqpar.layers.local.token_shift import TokenShift
from seqpar.layers.local.vig import ViG
from seqpar.layers.ssm.mamba2 import Mamba2
from tests.layers.oracles import oracles_local
from tests.layers.rows.row import Row


def _bmojo(window: int, **options: Any) -> BMojoF:
    """One that remembers: its memory's steps are 0.3, its decays 0.95 to 0.99."""
    memory = Mamba2(8, head_dim=8, state_dim=3)
    memory.dt_bias.data.fill_(-1.0)
    memory.log_a.data.uniform_(-3.5, -2.0)
    return BMojoF(8, 2, window=window, memory=memory, **options)


ROWS: dict[str, Row] = {
    "short_convolution": Row(
        "short_convolution",
        lambda: ShortConvolution(6, silu=True),
        oracles_local.short_convolution_layer,
        dim=6,
        remembers=False,
    ),
    "short_convolution, wide, bias": Row(
        "short_convolution",
        lambda: ShortConvolution(4, width=24, bias=True),
        oracles_local.short_convolution_layer,
        dim=4,
    ),
    "token_shift": Row("token_shift", lambda: TokenShift(6), oracles_local.token_shift_layer, dim=6, remembers=False),
    "gam": Row("gam", lambda: GAM(6, slots=5), oracles_local.gam_layer, dim=6, remembers=False),
    "gam, wide": Row("gam", lambda: GAM(4, slots=3, width=23), oracles_local.gam_layer, dim=4),
    "vig": Row("vig", lambda: ViG(8, 2, width=1), oracles_local.vig_layer, dim=8),
    "vig, one head": Row(
        "vig", lambda: ViG(6, 1, width=1, key_dim=4, gate_rank=3, temperature=4.0), oracles_local.vig_layer, dim=6
    ),
    "linformer": Row(
        "linformer", lambda: Linformer(8, 2, max_tokens=160, projected=3), oracles_local.linformer_layer, dim=8
    ),
    "linformer, shared": Row(
        "linformer",
        lambda: Linformer(6, 3, max_tokens=150, projected=4, shared=True),
        oracles_local.linformer_layer,
        dim=6,
    ),
    "bmojo_f": Row("bmojo_f", lambda: _bmojo(3), oracles_local.bmojo_layer, dim=8),
    "bmojo_f, untied, grouped": Row(
        "bmojo_f", lambda: _bmojo(7, kv_heads=1, tied=False, rope_base=None), oracles_local.bmojo_layer, dim=8
    ),
    "bmojo_f, window 1": Row("bmojo_f", lambda: _bmojo(1), oracles_local.bmojo_layer, dim=8),
}

UNFINISHED = {"memmamba": "not built: its equations were not at hand"}
