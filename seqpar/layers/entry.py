"""One row of the catalog: what is known of a token mixer besides its code."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from seqpar.collectives.scan import ALGORITHMS
from seqpar.sharding.shard import LAYOUTS


@dataclass(frozen=True)
class Sizes:
    """What a mixer is built from in a decoder: width, heads, and which layer of how many it is (from 0)."""

    dim: int = 64
    heads: int = 4
    layer: int = 0
    layers: int = 1

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class Entry:
    """A row: ``name`` in patterns, ``layer`` the class, ``paper``, and in words what ``crosses`` a cut.

    ``make`` builds it with its paper's defaults. ``bytes_per_cut(sizes, tokens)``: bytes that cross the cut between two
    ranks of ``tokens`` tokens each in one forward pass of one sequence in fp32, contiguous, by ``scan="ring"`` and
    ``transport="ring"``; tests count them. ``causal``: a token sees none after it, so a decoder can be made of it.
    ``recalls``: its paper claims associative recall. ``status``:
    ``works``, or what is missing.
    """

    name: str
    layer: str
    paper: str
    crosses: str
    make: Callable[[Sizes], nn.Module]
    bytes_per_cut: Callable[[Sizes, int], int]
    transports: tuple[str, ...] = ()
    scans: tuple[str, ...] = ALGORITHMS
    layouts: tuple[str, ...] = LAYOUTS
    causal: bool = True
    recalls: bool = False
    status: str = "works"


FLOAT_BYTES = 4
