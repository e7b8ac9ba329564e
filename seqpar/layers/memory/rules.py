"""How the weights of a memory change: a cell for :func:`seqpar.crossing.stream.stream`, chunk by chunk.

Two ways to the same numbers: ``"loop"`` makes the weights after every token, ``"closed"`` never does (where the rule is
affine inside a chunk).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.layers.memory.deep import Factors, Form, Loss, Matrices, after, factors, reads, shares, through

Tensors = tuple[Tensor, ...]
L2 = Loss()
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz


@dataclass(frozen=True)
class Rule:
    """``chunk``: gradients are taken at the weights of the start of each chunk of so many tokens of a document.

    ``depth`` matrices; ``momentum``: gradients are carried on; ``normed``: the output of the network is normed;
    ``gated``: it is one of three matrices with a gate inside; ``retention`` says what is read of what is carried,
    ``"plain"``, ``"norm"`` (divided by a power of the chunk's first norm) or ``"softmax"``; ``window``: a step counts
    the gradients of so many tokens; ``muon``: a step is made orthogonal, token by token. ``closed``: which of the two
    ways.
    """

    chunk: int
    depth: int = 2
    loss: Loss = L2
    momentum: bool = False
    normed: bool = False
    gated: bool = False
    retention: str = "plain"
    norm_power: float = 4.0
    window: int = 1
    muon: bool = False
    closed: bool = True

    @property
    def form(self) -> Form:
        """What the network does besides its matrices."""
        return Form(self.normed, self.gated)

    @property
    def affine(self) -> bool:
        """Whether there is a closed form."""
        return not self.muon and self.retention != "softmax" and (self.window == 1 or not self.momentum)

    def start(self, weights: Tensors) -> Tensors:
        """The state of a document that begins: weights, momentum, the chunk's first weights, the window's rows."""
        zeros = tuple(torch.zeros_like(matrix) for matrix in weights)
        heads, dim = weights[0].shape[0], weights[0].shape[-1]
        rows = [weights[0].new_zeros(heads, self.window - 1, dim)] * 2 if self.window > 1 else []
        return *weights, *(zeros if self.momentum or self.muon else ()), *zeros, *rows

    def __call__(self, tokens: "Tokens", state: Tensors, place: int) -> tuple[Tensor, Tensors]:
        """What tokens read, ``[n, steps, h, d]``, and the state after; ``place`` tokens of the chunk came before."""
        carried, outs = Carried.of(state, self), []
        for piece, begins in _pieces(tokens, self.chunk, place):
            if begins:
                carried = carried._replace(anchor=carried.weights)
            out, carried = self._chunk(piece, carried)
            outs.append(out)
        return torch.cat(outs, 2).transpose(1, 2), carried.state()

    def _chunk(self, piece: "Tokens", carried: "Carried") -> tuple[Tensor, "Carried"]:
        anchor, size = self._shown(carried.anchor)
        k, v = piece.k, piece.v
        if self.window > 1:
            k, v = (torch.cat(each, 2) for each in zip(carried.rows, (piece.k, piece.v)))
        found = factors(anchor, k, v, self.loss, piece.delta, self.form)
        step = self._closed if self.closed and self.affine and piece.step.dim() == 3 else self._loop
        out, carried = step(piece, carried, found, size)
        if self.window > 1:
            carried = carried._replace(rows=tuple(x[:, :, x.shape[2] - self.window + 1 :] for x in (k, v)))
        return out, carried

    def _shown(self, weights: Matrices) -> tuple[Matrices, Matrices]:
        """Which weights are read where those are carried, and what they were divided by."""
        if self.retention == "norm":
            sizes = tuple(_power(matrix, self.norm_power) for matrix in weights)
            return tuple(matrix / size for matrix, size in zip(weights, sizes)), sizes
        if self.retention == "softmax":
            return tuple(_spread(matrix) for matrix in weights), ()
        return weights, ()

    def _closed(self, piece: "Tokens", carried: "Carried", found: Factors, size: Matrices) -> tuple[Tensor, "Carried"]:
        of = shares(piece.log_keep, piece.step, piece.log_momentum if self.momentum else None, self._seen(piece))
        weights, seen = carried.weights, found
        if size:
            weights = tuple(matrix / each for matrix, each in zip(weights, size))
            seen = Factors([back / each for back, each in zip(found.back, size)], found.read)
        out = reads(piece.q, weights, carried.momentum, seen, of, self.form)
        ends, momentum = after(carried.weights, carried.momentum, found, of)
        return out, carried._replace(weights=ends, momentum=momentum)

    def _seen(self, piece: "Tokens") -> Tensor | None:
        """``[n, h, c, window - 1 + c]``: how much each token's step counts each row's gradient."""
        if self.window == 1:
            return None
        steps, rows = piece.q.shape[2], piece.q.shape[2] + self.window - 1
        back = torch.arange(steps, device=piece.q.device)[:, None] + self.window - 1
        back = back - torch.arange(rows, device=piece.q.device)  # how many tokens before
        there = (back >= 0) & (back < self.window)
        assert piece.gamma is not None
        place = back.clamp(0, self.window - 1).expand(*piece.gamma.shape[:2], steps, rows)
        return piece.gamma.gather(-1, place).masked_fill(~there, 0.0)

    def _loop(self, piece: "Tokens", carried: "Carried", found: Factors, size: Matrices) -> tuple[Tensor, "Carried"]:
        weights, momentum, outs, seen = carried.weights, carried.momentum, [], self._seen(piece)
        for t in range(piece.q.shape[2]):
            moved, pushed = [], []
            for place, matrix in enumerate(weights):
                gradient = _gradient(found, place, t, seen)
                before = momentum[place] if momentum else None
                end, push = self._step(piece, t, matrix, before, gradient)
                moved.append(end)
                pushed += [] if push is None else [push]
            weights, momentum = tuple(moved), tuple(pushed)
            shown = tuple(m / s for m, s in zip(weights, size)) if size else self._shown(weights)[0]
            outs.append(through(shown, piece.q[:, :, t : t + 1], self.form))
        return torch.cat(outs, 2), carried._replace(weights=weights, momentum=momentum)

    def _step(
        self, piece: "Tokens", t: int, matrix: Tensor, momentum: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One matrix and its momentum after token ``t``."""
        keep, step = _of_rows(piece.log_keep.exp(), t, matrix), _of_rows(piece.step, t, matrix)
        if momentum is None or piece.log_momentum is None:
            return keep * matrix - step * gradient, None
        carried = piece.log_momentum[:, :, t, None, None].exp() * momentum
        if self.muon:
            push = carried - gradient
            return keep * matrix + step * orthogonal(push), push
        push = carried - step * gradient
        return keep * matrix + push, push


class Tokens(NamedTuple):
    """Of a chunk, ``[n, h, c, d]`` and ``[n, h, c]`` (``log_keep`` and ``step``, where channels have their own,
    ``[n, h, c, d]``); ``gamma [n, h, c, window]``: by how many tokens before."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_keep: Tensor
    step: Tensor
    log_momentum: Tensor | None = None
    delta: Tensor | None = None
    gamma: Tensor | None = None


class Carried(NamedTuple):
    """The state: weights, momentum, the weights at the chunk's start, and the rows before that a window sees."""

    weights: Matrices
    momentum: Matrices
    anchor: Matrices
    rows: Matrices

    @staticmethod
    def of(state: Tensors, rule: Rule) -> "Carried":
        """From the tensors that travel."""
        depth, kinds = rule.depth, 3 if rule.momentum or rule.muon else 2
        parts = [state[depth * place : depth * (place + 1)] for place in range(kinds)]
        return Carried(parts[0], parts[1] if kinds == 3 else (), parts[-1], state[depth * kinds :])

    def state(self) -> Tensors:
        """The tensors that travel."""
        return *self.weights, *self.momentum, *self.anchor, *self.rows


def _pieces(tokens: Tokens, chunk: int, place: int) -> Iterator[tuple[Tokens, bool]]:
    """The tokens of each chunk, and whether they are its first."""
    steps, low = tokens.q.shape[2], 0
    while low < steps:
        high = min(steps, low + chunk - (place + low) % chunk)
        cut = [None if x is None else x[:, :, low:high] for x in tokens]
        yield Tokens(*cut), (place + low) % chunk == 0  # type: ignore[arg-type]
        low = high


def _gradient(found: Factors, place: int, t: int, seen: Tensor | None) -> Tensor:
    """Of one matrix in token ``t``'s step, ``[n, h, out, in]``."""
    back, read = found.back[place], found.read[place]
    if seen is None:
        return back[:, :, t, :, None] * read[:, :, t, None, :]
    return (back * seen[:, :, t, :, None]).transpose(-1, -2) @ read


def _of_rows(gates: Tensor, t: int, matrix: Tensor) -> Tensor:
    """Token ``t``'s gate of every row of a matrix, ``[n, h, rows or 1, 1]``: its channel's, where they are those of
    ``gates [n, h, c, d]``, else their mean."""
    if gates.dim() == 3:
        return gates[:, :, t, None, None]
    gate = gates[:, :, t, :, None]
    return gate if gate.shape[2] == matrix.shape[2] else gate.mean(2, keepdim=True)


def _power(matrix: Tensor, q: float) -> Tensor:
    """``|matrix|_q^(q - 2)`` over all entries, ``[n, h, 1, 1]``."""
    total = (matrix.square() ** (q / 2)).sum((-1, -2), keepdim=True)
    return (total + 1e-12) ** ((q - 2) / q)


def _spread(matrix: Tensor) -> Tensor:
    """Positive, with entries that sum to the number of rows."""
    return matrix.shape[-2] * matrix.flatten(-2).softmax(-1).view_as(matrix)


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of Newton and Schulz towards the nearest matrix whose singular values are one (about 0.7 to 1.2)."""
    turned = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.transpose(-1, -2) if turned else matrix
    x = x * (x.square().sum((-1, -2), keepdim=True) + 1e-14).rsqrt()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(-1, -2) if turned else x
