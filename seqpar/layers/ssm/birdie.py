"""Birdie's gated state-space model, causal or with a prefix read both ways (Blouir et al. 2024, arXiv 2411.01030)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.collectives.group import where
from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.sharding.cut import Cut

Prefix = Callable[[Cut], Tensor]


class GatedSSM(Fp32Parameters):
    """An elementwise recurrence with an input, a forget and an output gate, which may read a prefix both ways.

    ``h_t = f_t h_{t-1} + i_t z_t`` and ``out(o_t h_t)``, with ``i = sigmoid``, ``f = sigmoid`` (and ``forget_bias``),
    ``o = gelu`` and ``z`` linear of ``x``. ``x [b, t, dim]`` my tokens, and so is the result.

    ``prefix``: 0 is the causal layer. Otherwise the first half of the state goes forward and the second half backward,
    ``h_t = f_t h_{t+1} + i_t z_t``, with ``f_t = 0`` at tokens that are not of a prefix. The gate is that of the token
    that receives: the last token of a prefix still sees the first one after it, as in the paper, where this is a
    separator; what is after that sees no later token. A number: so many first tokens of each document are its prefix. A
    function of the cut returns ``[t]`` bool, which of my tokens are of a prefix; :func:`prefixes` makes one. With a
    prefix the layer keeps no states from call to call.

    ``state_dim`` numbers (default: ``dim``) travel, half of them the other way with a prefix, and as many decays unless
    a chain carries them.
    """

    fp32 = ("forget_bias",)

    def __init__(
        self, dim: int, *, state_dim: int | None = None, prefix: int | Prefix = 0, forget_bias: float = 0.0
    ) -> None:
        super().__init__()
        state_dim = dim if state_dim is None else state_dim
        positive(dim=dim, state_dim=state_dim)
        if not callable(prefix) and prefix < 0:
            raise ValueError(f"prefix must be at least 0 tokens, or a function of the cut, got {prefix}")
        if prefix != 0 and state_dim % 2:
            raise ValueError(f"with a prefix half of the state goes backward: state_dim must be even, got {state_dim}")
        self.input = nn.Linear(dim, state_dim, bias=False)
        self.forget = nn.Linear(dim, state_dim, bias=False)
        self.output = nn.Linear(dim, state_dim, bias=False)
        self.z = nn.Linear(dim, state_dim, bias=False)
        self.forget_bias = nn.Parameter(torch.full((state_dim,), float(forget_bias)))
        self.out = nn.Linear(state_dim, dim, bias=False)
        self.prefix = prefix

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What each token adds to the state, and its log decays, in fp32 (fp64 for fp64): ``[b, t, state_dim]``."""
        exact = exact_dtype(x)
        log_f = functional.logsigmoid(self.forget(x).to(exact) + self.forget_bias.to(exact))
        return self.input(x).sigmoid() * self.z(x), log_f

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """The scans, which mix tokens: ``h [b, t, state_dim]``."""
        (inputs, log_f), here = parts, Here.of(cut, self)
        if self.prefix == 0:
            return here.diagonal_scan(inputs, log_f)
        mine = self._prefix(cut)[:, None].to(log_f.device)
        (ahead, back), (log_ahead, log_back) = inputs.chunk(2, -1), log_f.chunk(2, -1)
        log_back = log_back.masked_fill(~mine, -torch.inf)
        backward = here.diagonal_scan(back, log_back, backwards=True)  # first: it refuses states
        return torch.cat([here.diagonal_scan(ahead, log_ahead), backward], -1)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Gated and put together, token by token."""
        return self.out(o * functional.gelu(self.output(x)))

    def _prefix(self, cut: Cut) -> Tensor:
        """``[t]`` bool: which of my tokens are of a prefix."""
        if not callable(self.prefix):
            return cut.positions < self.prefix
        found = self.prefix(cut)
        if found.dtype != torch.bool or found.shape != cut.positions.shape:
            expected = list(cut.positions.shape)
            raise ValueError(
                f"{where(cut.group)}: prefix must return bool {expected}, got {found.dtype} {list(found.shape)}"
            )
        return found


def prefixes(lengths: Sequence[int]) -> Prefix:
    """The first ``lengths[d]`` tokens of document ``d`` are its prefix: for :class:`GatedSSM`, batch by batch."""

    def of(cut: Cut) -> Tensor:
        if len(lengths) != len(cut.shard.lengths):
            raise ValueError(
                f"{where(cut.group)}: prefixes of {len(lengths)} documents were given, got {len(cut.shard.lengths)}"
            )
        found = torch.zeros(cut.shard.num_local, dtype=torch.bool)
        for piece in cut.shard.pieces_of(cut.group.rank):
            positions = piece.first + piece.step * torch.arange(piece.count)
            found[piece.row : piece.row + piece.count] = positions < lengths[piece.document]
        return found

    return of
