"""Any recurrent cell as a layer that is cut: yours, too."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from seqpar.crossing.here import Here, streamed
from seqpar.layers.parts.checks import positive
from seqpar.sharding.cut import Cut

Tensors = tuple[Tensor, ...]


class RecurrentCell(Protocol):
    """A module that goes over some steps of documents side by side, in ordinary differentiable torch.

    ``cell(x, state) -> (y, state)``: ``x [n, steps, dim]``, ``state`` tensors ``[n, ...]``, ``y [n, steps, ...]``;
    ``start()``: the state's tensors of one document that begins, zeros or learned. It gets fp32 (fp64 for fp64), uses
    its own parameters only, and mixes nothing over ``n``.
    """

    def __call__(self, x: Tensor, state: Tensors) -> tuple[Tensor, Tensors]: ...

    def start(self) -> Tensors: ...


class RecurrentLayer(nn.Module):
    """A :class:`RecurrentCell` over the documents of a cut sequence; see :func:`seqpar.crossing.stream.stream`.

    Law: the ranks' outputs and gradients, put together, are those of one device. ``x [b, t, dim]`` my tokens; returns
    ``[b, t, ...]``. ``backwards``: from the last token of each document to its first. ``chunk``: the cell's third
    argument is how many tokens of its chunk, of so many from the document's start on, came before. ``every``: a state
    is kept every so many steps for backward (0: about the square root of the steps). ``learns``: the cell calls
    ``torch.autograd.grad(..., create_graph=True)`` itself.
    """

    def __init__(
        self, cell: nn.Module, *, backwards: bool = False, chunk: int = 0, every: int = 0, learns: bool = False
    ) -> None:
        super().__init__()
        if not hasattr(cell, "start"):
            raise ValueError(f"a cell has a method start() that gives the first state, {type(cell).__name__} has none")
        self.cell = cell
        self.backwards, self.chunk, self.every, self.learns = backwards, chunk, every, learns

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        found = dict(self.cell.named_parameters())
        names, params = tuple(found), tuple(found.values())
        start = self.cell.start()  # type: ignore[operator]

        def cell(given: Tensors, rows: Tensors, state: Tensors, *place: int) -> tuple[Tensor, Tensors]:
            own = dict(zip(names, given))
            result: tuple[Tensor, Tensors] = functional_call(self.cell, own, (rows[0], state, *place))
            return result

        how: dict[str, Any] = {"chunk": self.chunk, "every": self.every, "learns": self.learns}
        return streamed(Here.of(cut, self), cell, params, (x,), start, backwards=self.backwards, **how)


class LeakyCell(nn.Module):
    """Leaky units with time constants: ``u_t = (1 - 1 / tau) u_{t-1} + leaky_relu(W u_{t-1} + V x_t + b) / tau``.

    ``tau = 1 + softplus(rate)`` steps, one per unit, is learned. An example of a cell for :class:`RecurrentLayer`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        positive(dim=dim)
        self.recurrent = nn.Parameter(torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.inner = nn.Parameter(torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.rate = nn.Parameter(torch.linspace(-1.0, 4.0, dim))

    def start(self) -> Tensors:
        return (torch.zeros_like(self.bias),)

    def forward(self, x: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        (u,), share, outs = state, 1 / (1 + functional.softplus(self.rate)), []
        for driven in (functional.linear(x, self.inner) + self.bias).unbind(1):
            u = u + share * (functional.leaky_relu(functional.linear(u, self.recurrent) + driven) - u)
            outs.append(u)
        return torch.stack(outs, 1), (u,)
