"""B'MOJO-F: attention over recent tokens and over what a fading memory says of older ones (Zancato et al. 2024, arXiv
2407.06324)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.here import Here
from seqpar.layers.parts.checks import head_dim, positive
from seqpar.layers.parts.rope import rotary
from seqpar.layers.ssm.mamba2 import Mamba2
from seqpar.sharding.cut import Cut


class BMojoF(nn.Module):
    """One softmax over the last ``window`` tokens and over the ``window`` outputs of a recurrence that come before.

    ``memory`` is any causal layer ``[b, t, dim] -> [b, t, dim]`` called with the cut (default: Mamba-2 with as many
    heads). Token ``i`` sees the keys of tokens ``i - window + 1`` to ``i`` of its document, and the fading keys of
    ``i - 2 window + 1`` to ``i - window``: projections of the memory's output, by the same weights as the others or,
    with ``tied=False``, by its own (queries, too). Queries and keys are rotated by the position of their token. The
    innovation selection of full B'MOJO, which keeps surprising tokens for good, is not part of B'MOJO-F.

    ``x [b, t, dim]`` my tokens, and so is the result. What the memory sends travels, and the keys and values of both
    kinds of the last ``2 window - 1`` tokens, which are the state between calls, too. Fewer ``kv_heads`` serve
    ``heads / kv_heads`` neighbouring heads each. The published model has windows of 2048.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 64,
        memory: nn.Module | None = None,
        kv_heads: int | None = None,
        tied: bool = True,
        rope_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        size, kv_heads = head_dim(dim, heads, None), heads if kv_heads is None else kv_heads
        positive(window=window, kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got heads={heads} and kv_heads={kv_heads}")
        if rope_base is not None and size % 2:
            raise ValueError(f"rotary positions need an even dim / heads, got {size}: change it, or rope_base=None")
        self.memory = Mamba2(dim, head_dim=2 * size, state_dim=min(128, 4 * size)) if memory is None else memory
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * kv_heads * size, bias=False)
        self.fading_q = None if tied else nn.Linear(dim, dim, bias=False)
        self.fading_kv = None if tied else nn.Linear(dim, 2 * kv_heads * size, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.heads, self.kv_heads, self.window, self.rope_base = heads, kv_heads, window, rope_base

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries to recent and to fading tokens, keys and values of recent ones, and what the memory reads."""
        q = self._rotated(self.q(x).unflatten(-1, (self.heads, -1)), positions)
        fading_q = q
        if self.fading_q is not None:
            fading_q = self._rotated(self.fading_q(x).unflatten(-1, (self.heads, -1)), positions)
        return q, fading_q, self._keys_and_values(self.kv, x, positions), x

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, the memory and the attention over two windows: ``o [b, t, h, d]``."""
        (q, fading_q, recent, x), here = parts, Here.of(cut, self)
        project = self.kv if self.fading_kv is None else self.fading_kv
        fading = self._keys_and_values(project, self.memory(x, cut), here.positions)
        rows, places = here.preceding(torch.cat([recent, fading], 2).flatten(2), 2 * self.window - 1)
        keys = [each.unflatten(-1, (self.kv_heads, -1)) for each in rows.chunk(4, -1)]
        keys = [each.repeat_interleave(self.heads // self.kv_heads, 2) for each in keys]
        return _two_windows((q, fading_q), keys, places, here.positions.to(q.device), self.window)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads put together, token by token."""
        return self.out(o.flatten(-2))

    def _keys_and_values(self, project: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        """Rotated keys, then values: ``[b, t, 2 kv_heads, d]``."""
        k, v = project(x).unflatten(-1, (2 * self.kv_heads, -1)).chunk(2, 2)
        return torch.cat([self._rotated(k, positions), v], 2)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rope_base is None else rotary(x, positions, self.rope_base)


def _two_windows(
    queries: tuple[Tensor, Tensor], keys: list[Tensor], places: Tensor, positions: Tensor, window: int
) -> Tensor:
    """Attention of tokens at ``places`` of the rows: keys and values of recent tokens up to ``window - 1`` rows before,
    and, in the same softmax, of fading ones from there up to ``2 window - 1`` rows before.

    The rows are cut into blocks of ``window``: each sees two blocks of recent and two of fading keys. ``queries``
    ``[b, t, h, d]`` of both kinds, ``keys``: recent keys and values, fading ones, ``[b, rows, h, d]``.
    """
    batch, rows = keys[0].shape[:2]
    if not rows:
        return keys[1]
    blocks = -(-rows // window)
    recent_k, recent_v, fading_k, fading_v = (
        functional.pad(x, (0, 0, 0, 0, 2 * window, blocks * window - rows)).unflatten(1, (-1, window)) for x in keys
    )
    k = _side_by_side(recent_k, fading_k, queries[0] is not queries[1])
    v = _side_by_side(recent_v, fading_v, False)
    q = queries[0] if queries[0] is queries[1] else torch.cat(queries, -1)
    q = q.new_zeros((batch, blocks * window, *q.shape[2:])).index_copy(1, places, q).unflatten(1, (-1, window))
    seen = _seen(places, positions, blocks, window).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    o = functional.scaled_dot_product_attention(q, k, v, seen, scale=v.shape[-1] ** -0.5)
    return o.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2).index_select(1, places)


def _side_by_side(recent: Tensor, fading: Tensor, apart: bool) -> Tensor:
    """What each block sees ``[b, blocks, 4 window, h, d]``, of blocks with two of padding before them. ``apart``: in
    channels of their own, so that each kind meets its own queries."""
    if apart:
        recent, fading = functional.pad(recent, (0, recent.shape[-1])), functional.pad(fading, (fading.shape[-1], 0))
    return torch.cat([recent[:, 1:-1], recent[:, 2:], fading[:, :-2], fading[:, 1:-1]], 2)


def _seen(places: Tensor, positions: Tensor, blocks: int, window: int) -> Tensor:
    """``[1 or b, blocks, window, 4 window]``: which keys each row sees; rows that hold no query see themselves."""
    positions = positions.view(-1, positions.shape[-1])
    none = positions.new_zeros(len(positions), blocks * window)
    before = none.index_copy(1, places, positions).unflatten(1, (blocks, window))[..., None]
    row, key = torch.arange(window, device=places.device)[:, None], torch.arange(2 * window, device=places.device)
    recent, fading = row + window - key, row + 2 * window - key  # how many tokens before the row's own
    near, far = (recent >= 0) & (recent < window), (fading >= window) & (fading < 2 * window)
    return torch.cat([near & (recent <= before), far & (fading <= before)], -1)
