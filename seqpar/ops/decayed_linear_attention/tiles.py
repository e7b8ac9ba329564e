"""Tile sizes of the kernels: a table per architecture, dtype and head dims. No search, at import or ever."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqpar.ops import launch


@dataclass(frozen=True)
class Block:
    """Key and value dims that one program holds at a time, and how many warps and pipeline stages it has."""

    k: int
    v: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """``chunk`` tokens; the blocks of the kernels that chain states, make outputs, and make dq and dk.

    ``programs``: fewer programs than this leave the device empty, so that the chain is split, into
    stretches of at least ``stretch`` chunks. ``precision`` of products of fp32 operands: "tf32x3" splits each into
    three parts for the matrix units, as exact as fp32 up to its last bits; on AMD fp32 has matrix units of its own.
    """

    chunk: int
    chain: Block
    output: Block
    gradient: Block
    programs: int
    stretch: int = 8
    precision: str = "ieee"


_INTERPRETER = Tiles(16, Block(64, 64, 4, 1), Block(64, 64, 4, 1), Block(64, 64, 4, 1), 4)
_EXACT = Tiles(64, Block(32, 32, 8, 1), Block(32, 32, 8, 2), Block(32, 32, 8, 2), 256)
_EXACT_NVIDIA = replace(_EXACT, precision="tf32x3")
_EXACT_WIDE = ("sm_90", "gfx942")  # where the gradients of 64 tokens in fp32 fit into registers
_SAFE = Tiles(64, Block(64, 64, 4, 2), Block(64, 64, 4, 2), Block(64, 64, 4, 2), 256)
_TABLE = {
    "sm_80": Tiles(64, Block(64, 64, 8, 2), Block(64, 64, 8, 2), Block(32, 32, 8, 2), 216),
    "sm_90": Tiles(64, Block(64, 64, 4, 3), Block(64, 128, 4, 2), Block(64, 64, 8, 3), 264),
    "gfx942": Tiles(64, Block(64, 64, 4, 2), Block(64, 64, 4, 2), Block(64, 64, 4, 2), 608),
}


def tiles_for(q: Tensor, v: Tensor, vector: bool) -> Tiles:
    """The tiles for q [b, t, h, k] and v [b, t, h, v] on their device; fp32 multiplies exactly, in smaller blocks.

    Gates per key channel, ``vector``, take twice the registers in the chain and in the gradients.
    """
    architecture = launch.architecture(q)
    if architecture == "cpu":
        tiles = _INTERPRETER
    elif q.dtype in (torch.bfloat16, torch.float16):
        tiles = _TABLE.get(architecture, _SAFE)
    else:
        tiles = _EXACT_NVIDIA if architecture.startswith("sm_") else _EXACT
        tiles = replace(tiles, chunk=64 if architecture in _EXACT_WIDE else 32)
    if vector:
        tiles = _for_vector_gates(tiles, exact=q.element_size() > 2, aligned=q.shape[-1] % 8 == 0)
    return fitted(tiles, q.shape[1], q.shape[-1], v.shape[-1])


def _for_vector_gates(tiles: Tiles, *, exact: bool, aligned: bool) -> Tiles:
    """Rows that are not aligned, and products of fp32, take more registers still."""
    k, stages = (16, 1) if exact else (tiles.chain.k, tiles.chain.stages) if aligned else (32, 2)
    return replace(
        tiles, chain=replace(tiles.chain, k=k, warps=8, stages=stages), gradient=replace(tiles.gradient, k=32)
    )


def fitted(tiles: Tiles, tokens: int, k: int, v: int) -> Tiles:
    """No chunk, and no block, much larger than what there is to hold; 16 is the least that tl.dot takes."""
    chunk = tiles.chunk
    while chunk > 16 and chunk >= 2 * tokens:
        chunk //= 2
    chain, output, gradient = (
        replace(block, k=_fit(block.k, k), v=_fit(block.v, v)) for block in (tiles.chain, tiles.output, tiles.gradient)
    )
    return replace(tiles, chunk=chunk, chain=chain, output=output, gradient=gradient)


def _fit(block: int, dim: int) -> int:
    while block > 16 and block >= 2 * dim:
        block //= 2
    return block
