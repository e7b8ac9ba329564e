"""``h_t = A h_(t-1) + B u_t`` and ``y_t = C h_t`` in chunks: matmuls inside of them, few steps from one to the next.

Autograd differentiates it, so the matrices may be learned. Their powers are computed in fp64: in fp32 those of a matrix
such as the Legendre memory's, whose norm first grows and then decays, soon have no right digit left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.linear_system.matrix import Matrix, matrix_of
from seqpar.ops.linear_system.pieces import Pieces


@dataclass(frozen=True)
class Tables:
    """What all pieces share. ``write [h, i, n]``: ``A^i B``, what is left of an input after ``i`` more tokens;
    ``read [h, i, q, n]``: ``C A^(i+1)``, what token ``i`` reads of the state before its chunk; ``mix [h, i, j, q]``:
    what it reads of input ``j``, of as many tokens as the longest piece has. In fp64, what 1, 2, 4, ... tokens multiply
    a state by: ``up_to`` a chunk, and ``over`` the whole one and more.
    """

    write: Tensor
    read: Tensor
    mix: Tensor
    up_to: tuple[Matrix, ...]
    over: tuple[Matrix, ...]


def tables(a: Tensor, b: Tensor, c: Tensor, pieces: Pieces, dtype: torch.dtype) -> Tables:
    """For ``a [h, n, n]`` or ``[h, n / 2]`` complex, ``b [h, n]``, ``c [h, q, n]``, in ``dtype``."""
    b, c = b.double(), c.double()
    powers = [matrix_of(a)]
    write, read = b[:, None], powers[0].rows(c)
    for level in range((pieces.longest - 1).bit_length()):
        write = torch.cat([write, powers[level].columns(write)], 1)
        read = torch.cat([read, powers[level].rows(read)], 1)
        powers.append(powers[-1].squared())
    chunk = pieces.chunk.bit_length() - 1
    while 2 ** (len(powers) - chunk) <= pieces.deepest:
        powers.append(powers[-1].squared())
    distance = torch.arange(pieces.longest, device=a.device)
    distance = distance[:, None] - distance
    mix = (write @ c.mT)[:, distance.clamp(min=0)] * (distance >= 0)[..., None]
    read = read.unflatten(1, (pieces.longest, -1))[:, : pieces.chunk]
    write = write[:, : pieces.chunk]
    return Tables(write.to(dtype), read.to(dtype), mix.to(dtype), tuple(powers[:chunk]), tuple(powers[chunk:]))


def leaving(inputs: Tensor, table: Tables, pieces: Pieces, incoming: Tensor | None) -> Tensor:
    """The state ``[b, pieces, h, n, v]`` after each piece, were it full; ``inputs [b, pieces, chunk, h, v]`` of those
    that states pass through.

    The states after 1, 2, 4, ... pieces at once: few steps, whatever the number of pieces.
    """
    states = torch.einsum("hjn,bmjhv->bmhnv", table.write.flip(1), inputs)
    if incoming is not None and pieces.continues:
        first = states[:, :1] + table.over[0].states(incoming[:, None])
        states = torch.cat([first, states[:, 1:]], 1)
    depth = pieces.depth[:, None, None, None]
    for level, power in enumerate(table.over):
        step = 2**level
        if step < states.shape[1]:
            passed = power.states(states[:, :-step]) * (depth[step:] >= step)
            states = torch.cat([states[:, :step], states[:, step:] + passed], 1)
    return states


def entering(states: Tensor, pieces: Pieces, incoming: Tensor | None) -> Tensor:
    """The state before each piece, from those after them."""
    first = torch.zeros_like(states[:, :1]) if incoming is None or not pieces.continues else incoming[:, None]
    follows = (pieces.depth[1:] > 0)[:, None, None, None]
    return torch.cat([first, states[:, :-1] * follows], 1)


def within(inputs: list[Tensor], table: Tables) -> list[Tensor]:
    """What tokens read of inputs of their own piece: ``[b, pieces, places, h, q, v]``."""
    sizes = [each.shape[2] for each in inputs]
    return [torch.einsum("hijq,bmjhv->bmihqv", table.mix[:, :size, :size], x) for x, size in zip(inputs, sizes)]


def across(states: Tensor, table: Tables) -> Tensor:
    """What tokens read of the states that enter their pieces: ``[b, pieces, chunk, h, q, v]``."""
    return torch.einsum("hiqn,bmhnv->bmihqv", table.read, states)


def final(inputs: Tensor, states: Tensor, table: Tables, pieces: Pieces) -> Tensor:
    """The state ``[b, h, n, v]`` after the last token, from those that enter the pieces."""
    write, state = table.write[:, : pieces.last].flip(1), states[:, -1]
    for bit, power in enumerate((*table.up_to, table.over[0])):
        if pieces.last >> bit & 1:
            state = power.states(state)
    return state + torch.einsum("hjn,bjhv->bhnv", write, inputs[:, -1, : pieces.last])


def run(u: Tensor, table: Tables, pieces: Pieces, incoming: Tensor) -> tuple[Tensor, Tensor]:
    """All of it, for autograd: the output ``[b, t, h, q, v]`` in the dtype of ``u``, and the final state."""
    inputs = pieces.apart(u.to(incoming.dtype))
    states = entering(leaving(inputs[0], table, pieces, incoming), pieces, incoming)
    out = output(within(inputs, table), states, table, pieces)
    return out.to(u.dtype), final(inputs[0], states, table, pieces)


def output(partial: list[Tensor], states: Tensor, table: Tables, pieces: Pieces) -> Tensor:
    """``[b, t, h, q, v]``, of what tokens read of their own pieces and of the states that enter these."""
    first, *others = partial
    return pieces.joined([first + across(states, table), *others])
