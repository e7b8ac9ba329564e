"""A small network as a memory: what its weights are after each token, and what a query reads from them.

Gradients of one token are rank one in every matrix, ``U = g a'``: ``a`` what the matrix read, ``g`` what came back. So
the weights after token t of a chunk, all of whose gradients are taken at the weights ``A`` with which it began, are
``W_t = keep W + carried S - sum_j C[t, j] g_j a_j'``, and a query reads them without ever making them. All of it is
ordinary torch, so that what comes before a memory learns through what it learned.

Shapes: ``n`` documents side by side, ``h`` heads, ``c`` tokens of a chunk; matrices ``[n, h, out, in]``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Matrices = tuple[Tensor, ...]
EPS = 1e-6


class Form(NamedTuple):
    """What a network does besides its matrices: ``normed``, its output is normed before its input is added; ``gated``,
    of three matrices, ``x + W1 (gelu(W2 x) * W3 x)``, which lie in the order W2, W3, W1."""

    normed: bool = False
    gated: bool = False


PLAIN = Form()


class Factors(NamedTuple):
    """Of each matrix: what came back to it, ``[n, h, c, out]``, and what it had read, ``[n, h, c, in]``."""

    back: list[Tensor]
    read: list[Tensor]


class Loss(NamedTuple):
    """What a memory goes down, as the gradient of its output: ``kind`` is ``"l2"`` (sum of squares), ``"lp"`` (sum of
    powers ``power``), ``"huber"`` (squares of errors up to the length ``delta``, beyond it delta times absolute
    values) or ``"dot"`` (minus the product with the value)."""

    kind: str = "l2"
    power: float = 3.0

    def gradient(self, out: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """``[n, h, c, d]``."""
        error = out - value
        if self.kind == "dot":
            return -value
        if self.kind == "lp":
            return self.power * error * (error.square() + EPS) ** (self.power / 2 - 1)
        if self.kind == "huber":
            assert delta is not None
            near = error.detach().square().sum(-1, keepdim=True) <= delta.detach()[..., None].square()
            return torch.where(near, 2 * error, delta[..., None] * error * (error.square() + EPS).rsqrt())
        return 2 * error


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of the exact gelu."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x.square()) * (0.5 / torch.pi) ** 0.5


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """``[n, h, c, in]`` through ``[n, h, out, in]``: ``[n, h, c, out]``."""
    return x @ matrix.transpose(-1, -2)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(x - mean) / sd`` over channels, and ``1 / sd``."""
    x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return x * scale, scale


def shown(x: Tensor, last: Tensor, depth: int, form: Form) -> Tensor:
    """The memory's output for ``x`` from what its last matrix gave: added to ``x``, normed before or not; alone if
    there is but one."""
    if depth == 1:
        return last
    return x + (centred(last)[0] if form.normed else last)


def factors(anchor: Matrices, k: Tensor, v: Tensor, loss: Loss, delta: Tensor | None, form: Form) -> Factors:
    """Of the gradients of ``loss`` at the weights ``anchor`` of every token."""
    if form.gated:
        return _gated_factors(anchor, k, v, loss, delta)
    read, slopes = [k], []
    for matrix in anchor[:-1]:
        before = times(matrix, read[-1])
        read.append(functional.gelu(before))
        slopes.append(gelu_slope(before))
    last = times(anchor[-1], read[-1])
    back = [loss.gradient(shown(k, last, len(anchor), form), v, delta)]
    if form.normed and len(anchor) > 1:
        unit, scale = centred(last)
        g = back[0]
        back[0] = scale * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))
    for matrix, slope in zip(reversed(anchor[1:]), reversed(slopes)):
        back.append(slope * (back[-1] @ matrix))
    return Factors(back[::-1], read)


def _gated_factors(anchor: Matrices, k: Tensor, v: Tensor, loss: Loss, delta: Tensor | None) -> Factors:
    before, gate = times(anchor[0], k), times(anchor[1], k)
    inner = functional.gelu(before)
    back = loss.gradient(k + times(anchor[2], inner * gate), v, delta)
    to_inner = back @ anchor[2]
    return Factors([gelu_slope(before) * gate * to_inner, inner * to_inner, back], [k, k, inner * gate])


class Shares(NamedTuple):
    """What is left in token t of the chunk's first weights ``keep [n, h, c]`` and momentum ``carried [n, h, c]``, and
    of the gradient of token j, ``step [n, h, c, j]``; the same of the momentum after the last, ``last_*``."""

    keep: Tensor
    carried: Tensor | None
    step: Tensor
    last_carried: Tensor | None
    last_step: Tensor | None


def shares(log_keep: Tensor, step: Tensor, log_momentum: Tensor | None, window: Tensor | None) -> Shares:
    """From the logarithms of what each token keeps, ``[n, h, c]``, and its step; ``window [n, h, c, rows]``: how much
    each token's step counts the gradient of each row."""
    keep, between = products(log_keep)
    if log_momentum is None:
        weights = between * step[:, :, None]
        return Shares(keep, None, weights if window is None else weights @ window, None, None)
    carried, momentum = products(log_momentum)
    weights = (between @ momentum) * step[:, :, None]
    return Shares(keep, (between @ carried[..., None])[..., 0], weights, carried[..., -1], momentum[..., -1, :] * step)


def products(logs: Tensor) -> tuple[Tensor, Tensor]:
    """``prod_{i<=t}`` and ``prod_{j<i<=t}`` (0 for j > t) of ``exp(logs)``."""
    total = logs.cumsum(-1)
    steps = logs.shape[-1]
    later = torch.ones(steps, steps, dtype=torch.bool, device=logs.device).tril()
    between = total[..., :, None] - total[..., None, :]
    return total.exp(), between.masked_fill(~later, -torch.inf).exp()


def reads(q: Tensor, weights: Matrices, momentum: Matrices, found: Factors, of: Shares, form: Form) -> Tensor:
    """What every token's query reads from the weights after that token: ``[n, h, c, d]``."""

    def read(place: int, x: Tensor) -> Tensor:
        y = of.keep[..., None] * times(weights[place], x)
        if of.carried is not None:
            y = y + of.carried[..., None] * times(momentum[place], x)
        return y - (of.step * (x @ found.read[place].transpose(-1, -2))) @ found.back[place]

    return network(read, len(weights), q, form)


def network(read: Callable[[int, Tensor], Tensor], depth: int, q: Tensor, form: Form) -> Tensor:
    """The output for ``q``, ``read(place, x)`` being what a matrix makes of its input."""
    if form.gated:
        return q + read(2, functional.gelu(read(0, q)) * read(1, q))
    x = q
    for place in range(depth):
        x = read(place, x)
        x = functional.gelu(x) if place + 1 < depth else x
    return shown(q, x, depth, form)


def after(weights: Matrices, momentum: Matrices, found: Factors, of: Shares) -> tuple[Matrices, Matrices]:
    """The weights and the momentum after the chunk's last token."""
    keep = of.keep[..., -1, None, None]
    ends, carried = [], []
    for place, matrix in enumerate(weights):
        end = keep * matrix - _summed(found, place, of.step[..., -1, :])
        if of.carried is not None:
            end = end + of.carried[..., -1, None, None] * momentum[place]
            assert of.last_carried is not None and of.last_step is not None
            moved = of.last_carried[..., None, None] * momentum[place]
            carried.append(moved - _summed(found, place, of.last_step))
        ends.append(end)
    return tuple(ends), tuple(carried)


def _summed(found: Factors, place: int, shares: Tensor) -> Tensor:
    """``sum_j shares_j g_j a_j'``."""
    return (found.back[place] * shares[..., None]).transpose(-1, -2) @ found.read[place]


def through(weights: Sequence[Tensor], q: Tensor, form: Form) -> Tensor:
    """What a query reads from weights that are there, ``[n, h, out, in]``."""
    return network(lambda place, x: times(weights[place], x), len(weights), q, form)
