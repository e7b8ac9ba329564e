"""Tile sizes of the kernels: a table per architecture, dtype and head dims. No search, at import or ever."""

from dataclasses import dataclass

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
    """``chunk`` tokens; the blocks of the kernels that solve chunks, chain states, make outputs, and gradients.

    ``precision`` of products of fp32 operands: "tf32x3" splits each into three parts, and is as exact as fp32 up to
    its last bits; on AMD fp32 has matrix units of its own.
    """

    chunk: int
    solve: Block
    chain: Block
    output: Block
    gradient: Block
    precision: str

    def options(self, block: Block) -> dict[str, int]:
        """What a launch is told about the program of a block."""
        return {"num_warps": block.warps, "num_stages": block.stages}


_INTERPRETER = Tiles(32, *(Block(64, 64, 4, 1),) * 4, "ieee")
# Chunks of 32 tokens: some compilers get 64 rows wrong on Hopper, https://github.com/fla-org/flash-linear-attention/issues/984
_SAFE = Tiles(32, Block(64, 64, 4, 2), Block(0, 32, 4, 2), Block(64, 64, 4, 2), Block(64, 32, 4, 2), "ieee")
_EXACT = Tiles(32, Block(32, 32, 4, 1), Block(0, 16, 8, 1), Block(32, 32, 4, 1), Block(32, 16, 4, 1), "tf32x3")
_EXACT_AMD = Tiles(32, Block(32, 32, 4, 1), Block(0, 16, 8, 1), Block(32, 32, 4, 1), Block(32, 16, 4, 1), "ieee")
_TABLE = {
    "sm_80": Tiles(32, Block(64, 64, 4, 2), Block(0, 32, 4, 2), Block(64, 64, 4, 2), Block(64, 32, 4, 2), "tf32x3"),
    "sm_90": Tiles(32, Block(64, 64, 4, 2), Block(0, 32, 4, 3), Block(64, 64, 4, 3), Block(64, 32, 4, 2), "tf32x3"),
    "gfx942": Tiles(32, Block(64, 64, 4, 1), Block(0, 32, 4, 1), Block(64, 64, 4, 1), Block(64, 32, 4, 1), "ieee"),
}


def tiles_for(q: Tensor, v: Tensor) -> Tiles:
    """The tiles for q [b, t, h, k] and v [b, t, h, v] on their device."""
    architecture = launch.architecture(q)
    if architecture == "cpu":
        tiles = _INTERPRETER
    elif q.dtype == torch.bfloat16:
        tiles = _TABLE.get(architecture, _SAFE)
    else:
        tiles = _EXACT if architecture.startswith("sm_") else _EXACT_AMD
    return fitted(tiles, q.shape[1], q.shape[-1], v.shape[-1])


def fitted(tiles: Tiles, tokens: int, k: int, v: int) -> Tiles:
    """No chunk, and no block, much larger than what there is to hold; 16 is the least that tl.dot takes."""
    chunk = tiles.chunk
    while chunk > 16 and chunk >= 2 * tokens:
        chunk //= 2
    blocks = (
        Block(_fit(block.k, k), _fit(block.v, v), block.warps, block.stages)
        for block in (tiles.solve, tiles.chain, tiles.output, tiles.gradient)
    )
    return Tiles(chunk, *blocks, tiles.precision)


def _fit(block: int, dim: int) -> int:
    while block > 16 and block >= 2 * dim:
        block //= 2
    return block


def whole(dim: int) -> int:
    """The smallest block that holds a dim."""
    return max(16, 1 << (dim - 1).bit_length())
