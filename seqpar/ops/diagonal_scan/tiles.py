"""How the tokens of a run are cut into chunks, and how many tokens and channels each kernel program takes."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

SHORTEST, LONGEST = 8, 128  # tokens of a chunk in the torch path


@dataclass(frozen=True)
class Cut:
    """``tokens`` rows in chunks of ``chunk`` rows, the last one maybe shorter.

    Rows and chunks count from the first that is travelled: with ``reverse`` that is the last in memory. ``zeros``: the
    rows, ascending, whose decay is zero whatever its logarithm says: there a document starts.
    """

    tokens: int
    chunk: int
    zeros: tuple[int, ...] = ()
    reverse: bool = False

    @property
    def num_chunks(self) -> int:
        return -(-self.tokens // self.chunk)

    @cached_property
    def zero_chunks(self) -> tuple[int, ...]:
        """The chunks that let nothing pass through."""
        return tuple(sorted({row // self.chunk for row in self.zeros}))


@dataclass(frozen=True)
class Tile:
    """What one kernel program takes: ``chunk`` tokens of ``block`` channels, with so many warps.

    ``steps``: how many tokens are loaded at once, before the first is needed.
    """

    chunk: int
    block: int
    warps: int
    steps: int


DIAGONAL = {
    "cpu": Tile(chunk=16, block=64, warps=1, steps=4),
    "sm_80": Tile(chunk=64, block=128, warps=1, steps=4),
    "sm_90": Tile(chunk=64, block=128, warps=1, steps=4),
    "gfx942": Tile(chunk=64, block=256, warps=1, steps=4),
}
SELECTIVE = {  # blocks for 16 states of each channel
    "cpu": Tile(chunk=16, block=64, warps=1, steps=4),
    "sm_80": Tile(chunk=64, block=32, warps=1, steps=4),
    "sm_90": Tile(chunk=64, block=32, warps=1, steps=4),
    "gfx942": Tile(chunk=64, block=64, warps=1, steps=4),
}
SELECTIVE_GRADIENT = {  # the same chunks; registers hold a state for each of the steps, too
    "cpu": Tile(chunk=16, block=64, warps=1, steps=4),
    "sm_80": Tile(chunk=64, block=16, warps=1, steps=2),
    "sm_90": Tile(chunk=64, block=16, warps=1, steps=2),
    "gfx942": Tile(chunk=64, block=32, warps=1, steps=2),
}
MOST_CHANNELS = 128  # of a block


def torch_chunk(tokens: int) -> int:
    """About the square root: as many steps inside of chunks as from chunk to chunk."""
    return min(max(1 << round(math.log2(math.sqrt(max(tokens, 1)))), SHORTEST), LONGEST)


def state_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64; complex for complex."""
    wide = x.dtype in (torch.float64, torch.complex128)
    if x.is_complex():
        return torch.complex128 if wide else torch.complex64
    return torch.float64 if wide else torch.float32


def chunk_sums(x: Tensor, cut: Cut, dtype: torch.dtype) -> Tensor:
    """The sum of ``x`` [b, t, d] over each chunk, [b, n, d], in the order of travel.

    Complex ones are modulo 2 pi i and in complex128: a sum of phases takes part in every later decay.
    """
    dtype = torch.complex128 if x.is_complex() else dtype
    rest = cut.tokens % cut.chunk
    if cut.reverse:
        part, whole = x[:, :rest], x[:, rest:]
    else:
        part, whole = x[:, cut.tokens - rest :], x[:, : cut.tokens - rest]
    sums = whole.reshape(x.shape[0], cut.tokens // cut.chunk, cut.chunk, x.shape[2]).sum(2, dtype=dtype)
    if cut.reverse:
        sums = sums.flip(1)
    if rest:
        sums = torch.cat([sums, part.sum(1, keepdim=True, dtype=dtype)], 1)
    return wrapped(sums)


def wrapped(log: Tensor) -> Tensor:
    """``log`` with its imaginary part in [-pi, pi]: a large phase would lose its last digits."""
    if not log.is_complex():
        return log
    return torch.complex(log.real, torch.remainder(log.imag + math.pi, 2 * math.pi) - math.pi)


def marks(cut: Cut, like: Tensor) -> Tensor | None:
    """1 for each row at which a document starts, else 0, in the order of travel; None if there is none."""
    if not cut.zeros:
        return None
    fresh = torch.zeros(cut.tokens, dtype=torch.uint8)
    fresh[list(cut.zeros)] = 1
    return fresh.to(like.device)


def diagonal_tile(architecture: str, pairs: bool = False) -> Tile:
    """The tile of the diagonal scan's kernels; ``pairs``: numbers are complex."""
    tile = DIAGONAL.get(architecture, DIAGONAL["sm_80"])
    return replace(tile, block=tile.block // 2) if pairs else tile


def selective_tile(architecture: str, states: int, gradient: bool = False) -> Tile:
    """The tile of the selective scan's kernels: fewer channels where each has more states, as all lie in registers."""
    table = SELECTIVE_GRADIENT if gradient else SELECTIVE
    tile = table.get(architecture, table["sm_80"])
    block = min(max(1, tile.block * 16 // (1 << (states - 1).bit_length())), MOST_CHANNELS)
    return replace(tile, block=block)
