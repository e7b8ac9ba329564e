"""``h_t = A h_(t-1) + B u_t`` and ``y_t = C h_t`` in chunks: matmuls inside of them, few steps from one to the next.

Autograd differentiates it, so the matrices may be learned. Their powers are computed in fp64: in fp32 those of a matrix
such as the Legendre memory's, whose norm first grows and then decays, soon have no right digit left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.linear_system.pieces import Pieces


@dataclass(frozen=True)
class Tables:
    """What all chunks share. ``write [h, i, n]``: ``A^i B``, what is left of an input after ``i`` more tokens;
    ``read [h, i, q, n]``: ``C A^(i+1)``, what token ``i`` reads of the state before its chunk; ``mix [h, i, j, q]``:
    what it reads of input ``j``. In fp64, what chunks multiply a state by: ``over [h, n, n]``, 1, 2, 4, ... of
    them, and ``rest``, the last one.
    """

    write: Tensor
    read: Tensor
    mix: Tensor
    over: tuple[Tensor, ...]
    rest: Tensor


def tables(a: Tensor, b: Tensor, c: Tensor, pieces: Pieces, dtype: torch.dtype) -> Tables:
    """For ``a [h, n, n]``, ``b [h, n]``, ``c [h, q, n]``, in ``dtype``."""
    a, b, c = a.double(), b.double(), c.double()
    power, write, read = a, b[:, None], c @ a
    while write.shape[1] < pieces.chunk:
        write = torch.cat([write, write @ power.mT], 1)
        read = torch.cat([read, read @ power], 1)
        power = power @ power
    over = [power]
    while 2 ** len(over) <= int(pieces.depth.max()):
        over.append(over[-1] @ over[-1])
    distance = torch.arange(pieces.chunk, device=a.device)
    distance = distance[:, None] - distance
    mix = (write @ c.mT)[:, distance.clamp(min=0)] * (distance >= 0)[..., None]
    rest = torch.linalg.matrix_power(a, pieces.last)
    read = read.unflatten(1, (pieces.chunk, -1))
    return Tables(write.to(dtype), read.to(dtype), mix.to(dtype), tuple(over), rest)


def leaving(inputs: Tensor, table: Tables, pieces: Pieces, incoming: Tensor | None) -> Tensor:
    """The state ``[b, pieces, h, n, v]`` after each piece, were it full; ``inputs [b, pieces, chunk, h, v]``.

    The states after 1, 2, 4, ... pieces at once: few steps, whatever the number of pieces.
    """
    states = torch.einsum("hjn,bmjhv->bmhnv", table.write.flip(1), inputs)
    if incoming is not None and pieces.continues:
        first = states[:, :1] + _through(table.over[0], incoming[:, None])
        states = torch.cat([first, states[:, 1:]], 1)
    depth = pieces.depth.to(states.device)[:, None, None, None]
    for level, power in enumerate(table.over):
        step = 2**level
        if step < states.shape[1]:
            passed = _through(power, states[:, :-step]) * (depth[step:] >= step)
            states = torch.cat([states[:, :step], states[:, step:] + passed], 1)
    return states


def entering(states: Tensor, pieces: Pieces, incoming: Tensor | None) -> Tensor:
    """The state before each piece, from those after them."""
    first = torch.zeros_like(states[:, :1]) if incoming is None or not pieces.continues else incoming[:, None]
    follows = (pieces.depth[1:] > 0).to(states.device)[:, None, None, None]
    return torch.cat([first, states[:, :-1] * follows], 1)


def within(inputs: Tensor, table: Tables) -> Tensor:
    """What tokens read of inputs of their own piece: ``[b, pieces, chunk, h, q, v]``."""
    return torch.einsum("hijq,bmjhv->bmihqv", table.mix, inputs)


def across(states: Tensor, table: Tables) -> Tensor:
    """What tokens read of the states that enter their pieces: ``[b, pieces, chunk, h, q, v]``."""
    return torch.einsum("hiqn,bmhnv->bmihqv", table.read, states)


def final(inputs: Tensor, states: Tensor, table: Tables, pieces: Pieces) -> Tensor:
    """The state ``[b, h, n, v]`` after the last token, from those that enter the pieces."""
    write = table.write[:, : pieces.last].flip(1)
    return _through(table.rest, states[:, -1]) + torch.einsum("hjn,bjhv->bhnv", write, inputs[:, -1, : pieces.last])


def run(pieces: Pieces, incoming: Tensor, u: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """All of it, for autograd: the output ``[b, t, h, q, v]`` in the dtype of ``u``, and the final state."""
    table = tables(a, b, c, pieces, incoming.dtype)
    inputs = pieces.apart(u.to(incoming.dtype))
    states = entering(leaving(inputs, table, pieces, incoming), pieces, incoming)
    out = pieces.joined(within(inputs, table) + across(states, table))
    return out.to(u.dtype), final(inputs, states, table, pieces)


def _through(power: Tensor, states: Tensor) -> Tensor:
    """A power of A times states ``[..., h, n, v]``, in fp64 whatever precision is set for matmuls."""
    return torch.einsum("hkn,...hnv->...hkv", power, states.double()).to(states.dtype)
