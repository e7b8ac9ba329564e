"""Mixture of experts: each token goes through a few of many feed-forward parts (Shazeer et al. 2017, arXiv 1701.06538).

Token by token: it crosses no cut. Every rank holds all experts; one that no token of a rank chose gets zeros there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from seqpar.layers.parts.checks import one_of, positive
from seqpar.layers.parts.mlp import ACTIVATIONS, MLP

ROUTERS = ("softmax_top", "top_softmax", "sigmoid_groups")


@dataclass(frozen=True)
class Router:
    """How a token's ``logits [..., experts]`` become ``top`` experts and their weights.

    ``"softmax_top"``: the largest of the softmax (Mixtral; Qwen-MoE), divided by their sum if ``normed``;
    ``"top_softmax"``: the softmax of the largest (gpt-oss); ``"sigmoid_groups"``: sigmoids, chosen by their sum with a
    correction, among the ``top_groups`` of ``groups`` groups whose two best are largest, divided by their sum if
    ``normed`` (DeepSeek-V3, arXiv 2412.19437). Weights are times ``scale``; fp32 (fp64 for fp64).
    """

    kind: str = "softmax_top"
    top: int = 2
    normed: bool = True
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def check(self, experts: int) -> None:
        """Raise ``ValueError`` unless it fits so many experts."""
        one_of("router", self.kind, ROUTERS)
        positive(top=self.top, groups=self.groups, top_groups=self.top_groups)
        if experts % self.groups or self.top_groups > self.groups:
            raise ValueError(f"{self.top_groups} of {self.groups} groups do not fit {experts} experts")
        if self.top > experts // self.groups * self.top_groups:
            raise ValueError(f"top {self.top} of {experts} experts in {self.top_groups} of {self.groups} groups")

    def __call__(self, logits: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The chosen experts and their weights, ``[..., top]`` each."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.kind == "top_softmax":
            values, chosen = logits.topk(self.top, -1)
            return chosen, values.softmax(-1) * self.scale
        if self.kind == "softmax_top":
            weights, chosen = logits.softmax(-1).topk(self.top, -1)
        else:
            rated = logits.sigmoid()
            chosen = self._in_groups(rated if correction is None else rated + correction).topk(self.top, -1).indices
            weights = rated.gather(-1, chosen)
        if self.normed:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale

    def _in_groups(self, rated: Tensor) -> Tensor:
        """-inf outside of the best groups."""
        if self.groups == 1:
            return rated
        grouped = rated.unflatten(-1, (self.groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1).topk(self.top_groups, -1).indices
        inside = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~inside.unsqueeze(-1), -torch.inf).flatten(-2)


class Experts(nn.Module):
    """The weighted sum of the experts that a router chooses for each token. ``x [b, t, dim]``, and so is the result.

    ``hidden``: of each expert; ``shared``: of one more that every token goes through (0: none; DeepSeekMoE, arXiv
    2401.06066), times a sigmoid of its own if ``shared_gated`` (Qwen). Weights are stacked: ``gate`` and ``up
    [experts, hidden, dim]``, ``down [experts, dim, hidden]``; ``correction [experts]`` is a buffer, without gradient.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        router: Router,
        *,
        activation: str = "silu",
        shared: int = 0,
        shared_gated: bool = False,
    ) -> None:
        super().__init__()
        positive(dim=dim, hidden=hidden, experts=experts)
        router.check(experts)
        self.rule, self.activation = router, one_of("activation", activation, ACTIVATIONS)
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(experts, hidden, dim) * dim**-0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)
        self.correction: Tensor | None
        self.register_buffer("correction", torch.zeros(experts) if router.kind == "sigmoid_groups" else None)
        self.shared = MLP(dim, shared, activation=activation) if shared else None
        self.shared_gate = nn.Linear(dim, 1, bias=False) if shared and shared_gated else None

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.rule(self.router(x), self.correction)
        rows = x.flatten(0, -2)
        total = torch.zeros(rows.shape, dtype=weights.dtype, device=x.device)
        chosen, weights = chosen.flatten(0, -2), weights.flatten(0, -2)
        for expert in chosen.unique().tolist():
            row, place = (chosen == expert).nonzero(as_tuple=True)
            total = total.index_add(0, row, self._one(expert, rows[row]) * weights[row, place, None])
        y = total.to(x.dtype).view_as(x)
        return y if self.shared is None else y + self._shared(x)

    def _one(self, expert: int, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        hidden = act(functional.linear(x, self.gate[expert])) * functional.linear(x, self.up[expert])
        return functional.linear(hidden, self.down[expert])

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        y: Tensor = self.shared(x)
        return y if self.shared_gate is None else y * self.shared_gate(x).sigmoid()
