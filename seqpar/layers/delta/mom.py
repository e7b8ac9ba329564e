"""Mixture of memories (Du et al. 2025, arXiv 2502.13685)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.crossing.convolution import causal_conv
from seqpar.crossing.here import Here
from seqpar.crossing.replicated import whole_gradient
from seqpar.layers.delta.delta_parts import Heads, conv_weight, log_rates, softplus_log_decay, step_bias, write_strength
from seqpar.layers.delta.streams import last_of_streams, streams_of
from seqpar.layers.parts.checks import one_of, positive
from seqpar.layers.parts.fp32 import Fp32Parameters
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.state_space import exact_dtype
from seqpar.ops.precision import exactly
from seqpar.sharding.cut import Cut

UPDATES = ("gated_delta", "delta", "gated", "linear")


class MoM(Fp32Parameters):
    """Several memories with a gated delta rule; a router sends each token to the best few, and to one that sees all.

    A token's ``top_k`` of ``memories`` are those of the largest ``softmax(router(x))``; their weights are scaled to
    sum to one, that of the shared memory is 1. Each memory has keys, values, beta and decay of its own; queries, the
    weights of the convolution, ``log_a`` and ``dt_bias`` are common. To a memory its tokens are a sequence: the
    convolution (``width`` tokens, silu) and the state see them, in their order within the document, and no others.
    (Published training code runs the convolution from one memory's tokens on into the next one's; that is not what is
    meant, nor what it does when generating.) Then ``out(norm(o) silu(gate(x)))`` with ``o`` the weighted sum.
    ``x [b, t, dim]`` my tokens, and so is the result.

    ``update``: what a memory does with a token: the gated delta rule; without its decay ``"delta"``; adding what beta
    lets in of it, with decay ``"gated"`` and without ``"linear"``. The paper's general form takes any linear one.

    The states of all memories travel, a matrix with each unless a chain carries them, the last ``width - 1`` rows of
    each memory before the convolution, and a byte per choice. Any layout will do. All memories are computed in place:
    a token leaves those it is not sent to as they are, so time and memory are those of ``memories + 1`` layers.
    ``key_dim`` of one head is by default half of ``dim / heads``; values are ``expand_v`` times as wide.
    """

    fp32 = ("dt_bias", "log_a")

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        memories: int = 4,
        top_k: int = 2,
        shared: bool = True,
        key_dim: int | None = None,
        expand_v: int = 2,
        width: int = 4,
        update: str = "gated_delta",
    ) -> None:
        super().__init__()
        self.update = one_of("update", update, UPDATES)
        positive(dim=dim, heads=heads, memories=memories, top_k=top_k, expand_v=expand_v, width=width)
        key_dim = max(1, dim // (2 * heads)) if key_dim is None else key_dim
        positive(key_dim=key_dim)
        if top_k > memories or memories > 256:
            raise ValueError(f"top_k must be at most memories, and those 256, got {top_k} and {memories}")
        self.sizes = Heads(heads, heads, key_dim, expand_v * key_dim)
        self.memories, self.top_k, self.shared = memories, top_k, shared
        keys, values, all_memories = heads * key_dim, heads * expand_v * key_dim, memories + shared
        self.router = nn.Linear(dim, memories, bias=False)
        self.q = nn.Linear(dim, keys, bias=False)
        self.kv = nn.Linear(dim, all_memories * (keys + values), bias=False)
        self.conv_weight = conv_weight(self.sizes.channels, width)
        self.beta = nn.Linear(dim, all_memories * heads, bias=False)
        gated = update.startswith("gated")
        self.decay = nn.Linear(dim, all_memories * heads, bias=False) if gated else None
        self.log_a = log_rates(heads) if gated else None
        self.dt_bias = step_bias(heads) if gated else None
        self.gate = nn.Linear(dim, values, bias=False)
        self.norm = RMSNorm(self.sizes.value_dim)
        self.out = nn.Linear(values, dim, bias=False)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        return self.finish(self.mix(self.project(x, cut.positions), cut), x)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Of each token: the router's shares ``[b, t, memories]`` (in fp32, fp64 for fp64), what every memory's
        convolution reads ``[b, t, m, channels]``, and its beta and log decay, if any, ``[b, t, m, h]``."""
        all_memories = self.memories + self.shared
        kv, beta = (y(x).unflatten(-1, (all_memories, -1)) for y in (self.kv, self.beta))
        qkv = torch.cat([self.q(x)[:, :, None].expand(-1, -1, all_memories, -1), kv], -1)
        parts = (self._shares(x), qkv, write_strength(beta, False))
        if self.decay is None or self.log_a is None or self.dt_bias is None:
            return parts
        decay = self.decay(x).unflatten(-1, (all_memories, -1))
        return *parts, softplus_log_decay(decay, self.log_a, self.dt_bias)

    def mix(self, parts: tuple[Tensor, ...], cut: Cut) -> Tensor:
        """What mixes tokens, convolutions and recurrences: ``o [b, t, h, v]``, summed over memories."""
        (shares, qkv, *gates), here = parts, Here.of(cut, self)
        weights, choices = self._choose(shares)
        (choices,) = here.slot.keep(lambda: (cut.shard.gather(choices),))
        chosen = functional.one_hot(choices.long(), self.memories).sum(2) > 0
        chosen = functional.pad(chosen, (0, int(self.shared)), value=True)
        q, k, v = (y.flatten(2, 3) for y in self._convolved(here, qkv, chosen))
        mine = cut.shard.take(chosen)[..., None]
        beta, *log_decay = (torch.where(mine, y, 0.0).flatten(2) for y in gates)
        how: dict[str, Any] = {"log_decay": log_decay[0] if log_decay else None, "scale": self.sizes.key_dim**-0.5}
        if self.update.endswith("delta"):
            o = here.delta_rule(q, k, v, beta, **how)
        else:
            o = here.linear_attention(q, k * beta[..., None].to(k.dtype), v, **how)
        return (o.unflatten(2, (*weights.shape[2:], -1)) * weights[..., None, None].to(o.dtype)).sum(2)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """The heads normed, gated and put together, token by token."""
        return self.out(self.norm(o).flatten(-2) * functional.silu(self.gate(x)))

    def balance(self, x: Tensor, cut: Cut) -> Tensor:
        """The loss that keeps all memories in use: ``memories sum_m f_m p_m``, 1 if they are used alike.

        ``x``: what the layer is called with. ``f_m`` is the share of choices that fell on a memory, ``p_m`` its mean
        share by the router, both over all tokens of all ranks (and of the batch) before they are multiplied. The same
        number on every rank; gradients on the ranks are parts that sum to the whole. 0 without tokens.
        """
        shares = self._shares(x)
        counts = functional.one_hot(self._choose(shares)[1].long(), self.memories).sum((0, 1, 2)).to(shares.dtype)
        mine = shares.sum((0, 1))
        totals = cut.group.all_reduce(torch.stack([counts, mine.detach()])).wait()
        tokens = max(1, x.shape[0] * cut.shard.num_tokens)
        used = mine + (totals[1] - mine.detach())  # the whole sum, with the gradient of mine
        return self.memories * (totals[0] / (tokens * self.top_k) * used / tokens).sum()

    def _shares(self, x: Tensor) -> Tensor:
        exact = exact_dtype(x)
        return exactly(functional.linear)(x.to(exact), self.router.weight.to(exact)).softmax(-1)

    def _choose(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of every memory ``[b, t, m]``, 0 for those not chosen, and the choices ``[b, t, top_k]``."""
        best, choices = shares.topk(self.top_k, -1)
        weights = torch.zeros_like(shares).scatter(-1, choices, best / best.sum(-1, keepdim=True))
        return functional.pad(weights, (0, int(self.shared)), value=1.0), choices.to(torch.uint8)

    def _convolved(self, here: Here, qkv: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[b, t, m, h, dim]`` after the convolution of each memory's own tokens; zeros for
        the others."""
        cut, before = here.cut, 0 if here.cut.states is None else self.conv_weight.shape[1] - 1
        streams = streams_of(chosen, cut.shard, before)
        source = self._continued(here, qkv, before)
        rows = streams.rows.to(qkv.device)
        x = source.flatten(0, 2)[rows][None]
        if cut.states is not None:
            conv = last_of_streams(x, streams, cut.group, here.slot)
            cut.states.leave(self, "conv", conv, cut.exchanged)
        y = causal_conv(x, self.conv_weight, shard=streams.shard, group=cut.group, slot=here.slot)
        q, k, v = (_placed(part[0], rows, source)[:, before:] for part in self.sizes.split(y))
        return q, k, v

    def _continued(self, here: Here, qkv: Tensor, before: int) -> Tensor:
        """``qkv`` after the last ``before`` inputs of each memory's convolution in earlier calls, or zeros."""
        states = here.cut.states
        earlier = None if states is None else states.enter(self, "conv")
        if earlier is None:
            return functional.pad(qkv, (0, 0, 0, 0, before, 0))
        return torch.cat([whole_gradient(earlier, here.cut.group).transpose(1, 2), qkv], 1)


def _placed(x: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """``x [n, h, dim]`` in their ``rows`` of ``like [b, t, m, ...]``, flattened: ``[b, t, m, h, dim]``, else zeros."""
    whole = x.new_zeros((like.shape[:3].numel(), *x.shape[1:]))
    return whole.index_copy(0, rows, x).unflatten(0, like.shape[:3])
