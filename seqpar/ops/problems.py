"""Small, hard problems for every recurrence: inputs that show whether two implementations agree.

Numbers in fp64 stand for inputs that take the dtype under test; numbers in fp32 (decays and gates) keep theirs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.ops.stages import Op, Tensors

TOKENS = 150  # two whole chunks of 64 and a part of one
STARTS = (70,)


@dataclass(frozen=True)
class Problem:
    """One call of a recurrence: ``build(impl)`` is the op, the rest is what it is called with, on the CPU."""

    name: str
    build: Callable[[str], Op]
    tokens: Tensors
    shared: Tensors = ()
    starts: tuple[int, ...] = STARTS

    def documents(self, starts: tuple[int, ...]) -> "Problem":
        """The same with documents that start elsewhere."""
        return replace(self, starts=starts)


def decayed(
    op: Callable[[float, str], Op],
    dim: int,
    tokens: int = TOKENS,
    value_dim: int | None = None,
    batch: int = 1,
    heads: int = 2,
) -> Iterator[Problem]:
    """Linear attention, ``op(scale, impl)``, with each kind of decay."""
    keys, values = (batch, tokens, heads, dim), (batch, tokens, heads, value_dim or dim)
    q, k, gates, v = random_tensors(0, keys, keys, keys, values)
    gates = _gates(gates)

    def build(impl: str) -> Op:
        return op(dim**-0.5, impl)

    starts = tuple(start for start in STARTS if start < tokens)
    yield Problem("none", build, (q, k, v, None), (), starts)
    yield Problem("constant", build, (q, k, v, None), (gates[0, 0, :, 0],), starts)
    yield Problem("scalar", build, (q, k, v, gates[..., 0]), (), starts)
    yield Problem("vector", build, (q, k, v, gates), (), starts)


def delta(
    op: Callable[[float, str], Op],
    dim: int,
    tokens: int = TOKENS,
    value_dim: int | None = None,
    batch: int = 1,
    heads: int = 2,
) -> Iterator[Problem]:
    """The delta rule, ``op(scale, impl)``, without, and with each kind of gate; keys have length 1."""
    keys, values = (batch, tokens, heads, dim), (batch, tokens, heads, value_dim or dim)
    q, k, gates, v, beta = random_tensors(0, keys, keys, keys, values, keys[:3])
    k, gates, beta = functional.normalize(k, dim=-1), _gates(gates), beta.sigmoid()

    def build(impl: str) -> Op:
        return op(dim**-0.5, impl)

    starts = tuple(start for start in STARTS if start < tokens)
    yield Problem("none", build, (q, k, v, beta, None), (), starts)
    yield Problem("scalar", build, (q, k, v, beta, gates[..., 0]), (), starts)
    yield Problem("vector", build, (q, k, v, beta, gates), (), starts)


def scans(
    diagonal: Callable[[str], Op],
    selective: Callable[[str], Op],
    channels: int,
    tokens: int = TOKENS,
    states: int = 16,
    batch: int = 2,
) -> Iterator[Problem]:
    """The diagonal scan with a decay per token, and the selective scan of Mamba."""
    wide, narrow = (batch, tokens, channels), (batch, tokens, states)
    x, gates, steps, keys, queries, rates = random_tensors(0, wide, wide, wide, narrow, narrow, (channels, states))
    starts = tuple(start for start in STARTS if start < tokens)
    yield Problem("diagonal", diagonal, (_gates(gates), x), (), starts)
    steps = functional.softplus(steps).float()
    yield Problem("selective", selective, (x, steps, keys, queries), (-rates.exp().float(),), starts)


def random_tensors(seed: int, *shapes: Sequence[int]) -> list[Tensor]:
    """Standard normal numbers in fp64, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes]


def _gates(logits: Tensor) -> Tensor:
    """Logarithms of decays, fp32."""
    return functional.logsigmoid(logits + 1.0).float()
