"""Tile sizes of the kernels: a table per architecture, dtype and head dims. No search, at import or ever."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqpar.ops import launch


@dataclass(frozen=True)
class Block:
    """Key and value dims that one program holds at a time, and how many warps and pipeline stages it has.

    ``k`` is not for the kernels that chain states: those hold all key dims, and few value dims.
    """

    k: int
    v: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """``chunk`` tokens; the blocks of the kernels that solve chunks, chain states, chain matrices, make outputs and
    gradients, and gradients where each key channel has its own decay.

    ``precision`` of products of fp32 operands: "tf32x3" splits each into three parts, and is as exact as fp32 up to
    its last bits; on AMD fp32 has matrix units of its own.
    """

    chunk: int
    solve: Block
    chain: Block
    transition: Block
    output: Block
    gradient: Block
    vector_gradient: Block
    precision: str

    def options(self, block: Block) -> dict[str, int]:
        """What a launch is told about the program of a block."""
        return {"num_warps": block.warps, "num_stages": block.stages}


def _tiles(
    chunk: int,
    dim: int,
    chain: tuple[int, int],
    transition: tuple[int, int],
    gradient: tuple[int, int],
    vector: tuple[int, int, int],
    stages: int,
    precision: str,
) -> Tiles:
    """A row of the table; ``chain``, ``transition`` and ``gradient`` are (value dims, warps), ``vector`` is (key
    dims, value dims, warps) of gradients where each key channel has its own decay."""
    wide = Block(dim, dim, 4, stages)
    chains = Block(0, *chain, stages), Block(0, *transition, stages)
    gradients = Block(dim, *gradient, stages), Block(*vector, stages)
    return Tiles(chunk, wide, *chains, wide, *gradients, precision)


_INTERPRETER = _tiles(32, 64, (64, 4), (64, 4), (64, 4), (64, 64, 4), 1, "ieee")
# Chunks of 32 tokens: some compilers get 64 rows wrong on Hopper, github.com/fla-org/flash-linear-attention/issues/984
_SAFE = _tiles(32, 64, (32, 4), (32, 4), (32, 4), (64, 32, 8), 2, "ieee")
_EXACT = _tiles(16, 32, (16, 8), (16, 8), (16, 8), (32, 16, 8), 1, "tf32x3")
_EXACT_AMD = _tiles(16, 32, (16, 8), (16, 8), (16, 8), (32, 16, 8), 1, "ieee")
_TABLE = {
    "sm_80": _tiles(32, 64, (32, 4), (32, 4), (32, 4), (64, 32, 8), 2, "tf32x3"),
    "sm_90": _tiles(32, 64, (32, 4), (32, 4), (32, 4), (64, 32, 8), 2, "tf32x3"),
    "gfx942": _tiles(32, 64, (32, 4), (16, 8), (32, 4), (32, 32, 4), 1, "ieee"),
}


def tiles_for(q: Tensor, v: Tensor, vector: bool) -> Tiles:
    """The tiles for q [b, t, h, k] and v [b, t, h, v] on their device; ``vector``: each key channel has a decay."""
    architecture = launch.architecture(q)
    if architecture == "cpu":
        tiles = _INTERPRETER
    elif q.dtype == torch.bfloat16:
        tiles = _TABLE.get(architecture, _SAFE)
    else:
        tiles = _EXACT if architecture.startswith("sm_") else _EXACT_AMD
    return fitted(tiles, q.shape[1], q.shape[-1], v.shape[-1], vector)


def fitted(tiles: Tiles, tokens: int, k: int, v: int, vector: bool) -> Tiles:
    """No chunk, and no block, much larger than what there is to hold; 16 is the least that tl.dot takes."""
    chunk = tiles.chunk
    while chunk > 16 and chunk >= 2 * tokens:
        chunk //= 2
    solve, chain, transition, output, gradient = (
        Block(_fit(block.k, k), _fit(block.v, v), block.warps, block.stages)
        for block in (
            tiles.solve,
            tiles.chain,
            tiles.transition,
            tiles.output,
            tiles.vector_gradient if vector else tiles.gradient,
        )
    )
    if vector:  # decays fill registers, too
        solve, chain = replace(solve, k=min(solve.k, 32)), replace(chain, v=16)
    if k > 128 or vector:  # the chains hold all key dims
        chain, transition = replace(chain, warps=8), replace(transition, warps=8)
    if (k % 8 or v % 8) and not vector:  # rows that are not aligned take more registers to load
        gradient = replace(gradient, k=min(gradient.k, 32), warps=8)
    return replace(
        tiles, chunk=chunk, solve=solve, chain=chain, transition=transition, output=output, gradient=gradient
    )


def _fit(block: int, dim: int) -> int:
    while block > 16 and block >= 2 * dim:
        block //= 2
    return block


def whole(dim: int) -> int:
    """The smallest block that holds a dim."""
    return max(16, 1 << (dim - 1).bit_length())
