"""The battery's rows of ``catalog_ssm``: small layers and their oracles."""

from functools import partial

import torch
from torch import Tensor

from seqpar.layers.ssm.birdie import GatedSSM
from seqpar.layers.ssm.mamba import Mamba
from seqpar.layers.ssm.rg_lru import RGLRU
from seqpar.layers.ssm.s4d import S4D
from seqpar.layers.ssm.s5 import S5
from seqpar.sharding.cut import Cut
from tests.layers.oracles import oracles_ssm
from tests.layers.rows.row import Row


def _mamba(dim: int, **sizes: int) -> Mamba:
    """One that remembers: its steps are 0.1 and more, its slowest state decays by 0.98 a token."""
    layer = Mamba(dim, **sizes)
    layer.dt_bias.data.fill_(-2.0)
    layer.log_a.data.sub_(2.0)
    return layer


def _of_all_tokens(cut: Cut) -> Tensor:
    """Every token of every document is of its prefix."""
    return torch.ones(cut.shard.num_local, dtype=torch.bool)


ROWS: dict[str, Row] = {
    "mamba": Row("mamba", lambda: _mamba(6, state_dim=3), oracles_ssm.mamba_layer, dim=6),
    "mamba, width 2, rank 3": Row(
        "mamba", lambda: _mamba(4, state_dim=2, width=2, dt_rank=3, expand=3), oracles_ssm.mamba_layer, dim=4
    ),
    "s4d": Row("s4d", lambda: S4D(6, state_dim=6), oracles_ssm.s4d_layer, dim=6),
    "s5": Row("s5", lambda: S5(6, state_dim=8, blocks=2), oracles_ssm.s5_layer, dim=6),
    "s5, one block, few states": Row("s5", lambda: S5(8, state_dim=2, blocks=1), oracles_ssm.s5_layer, dim=8),
    "rg_lru": Row("rg_lru", lambda: RGLRU(6, 2), oracles_ssm.rg_lru_layer, dim=6),
    "rg_lru, own width, one block": Row(
        "rg_lru", lambda: RGLRU(6, 1, inner_dim=5, width=2), oracles_ssm.rg_lru_layer, dim=6
    ),
    "birdie": Row("birdie", lambda: GatedSSM(8, state_dim=5, forget_bias=2.5), oracles_ssm.gated_ssm_layer, dim=8),
    "birdie_prefix": Row(
        "birdie_prefix",
        lambda: GatedSSM(8, state_dim=6, prefix=7, forget_bias=2.5),
        partial(oracles_ssm.first_tokens, count=7),
        dim=8,
    ),
    "birdie_prefix, a function": Row(
        "birdie_prefix",
        lambda: GatedSSM(6, prefix=_of_all_tokens, forget_bias=2.5),
        partial(oracles_ssm.first_tokens, count=1000),
        dim=6,
    ),
}
