"""A row of the battery."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Oracle = Callable[[nn.Module, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Row:
    """``entry``: the catalog's name. ``make``: a small layer of width ``dim``. ``oracle(layer, x, lengths)``: the same
    layer's output from its parameters by its paper's equations, token by token, in fp64, with autograd's gradients.
    ``remembers``: tokens ten before still matter. ``nightly``: the ordinary suite has another row of this code."""

    entry: str
    make: Callable[[], nn.Module]
    oracle: Oracle
    dim: int = 16
    remembers: bool = True
    nightly: bool = False
