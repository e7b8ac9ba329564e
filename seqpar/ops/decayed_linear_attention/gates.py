"""Gates and document starts as the kernels take them: summed up per chunk where all key channels share them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqpar.ops import launch

HEADS_OF_A_PROGRAM = 16


@dataclass(frozen=True)
class Gates:
    """How a state fades over chunks of ``chunk`` tokens, and where it is reset.

    ``shared``: all key channels of a head fade alike; ``vector``: each in its own way, by ``log_decay`` [b, t, h, k];
    neither: not at all. ``sums`` [4, b or 1, h, n * C], ``segments`` [b or 1, h or 1, n * C]: see ``kernel.py``.
    ``totals`` [b or 1, h, n, 1 or k]: the gates' sums over chunks. ``fresh``: a document starts with the token that the
    scan reads first, so nothing is seen of the incoming state.
    """

    tokens: int
    chunk: int
    dtype: torch.dtype
    reverse: bool
    starts: tuple[int, ...]
    fresh: bool
    like: Tensor
    log_decay: Tensor | None = None
    sums: Tensor | None = None
    segments: Tensor | None = None
    totals: Tensor | None = None

    @property
    def num_chunks(self) -> int:
        return -(-self.tokens // self.chunk)

    @property
    def shared(self) -> bool:
        return self.sums is not None

    @property
    def vector(self) -> bool:
        return self.log_decay is not None

    @property
    def segmented(self) -> bool:
        return self.segments is not None

    @property
    def fades(self) -> bool:
        """Is anything of a state lost on its way?"""
        return self.shared or self.vector or self.segmented

    @property
    def lacks_totals(self) -> bool:
        return self.vector and self.totals is None

    def with_totals(self, totals: Tensor | None) -> "Gates":
        return self if totals is None else replace(self, totals=totals)

    def total(self) -> Tensor | None:
        """Sum of the gates over all tokens: None, [b or 1, h, 1, 1] or [b, h, k, 1]."""
        return None if self.totals is None else self.totals.sum(2).unsqueeze(-1)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """log_decay, sums and segments; something else stands for what is missing."""
        return tuple(self.like if x is None else x for x in (self.log_decay, self.sums, self.segments))  # type: ignore[return-value]

    def strides(self) -> tuple[int, ...]:
        """Of log_decay per batch, token and head; of sums per batch, head and part; of segments per batch and head."""
        gates = (0, 0, 0) if self.log_decay is None else self.log_decay.stride()[:3]
        sums, segments = self.sums, self.segments
        batch, head, part = (
            (0, 0, 0) if sums is None else (sums.stride(1) * (sums.shape[1] > 1), sums.stride(2), sums.stride(0))
        )
        return (*gates, batch, head, part, *(broadcast_strides(segments) if segments is not None else (0, 0)))

    def flags(self) -> tuple[bool, bool, bool, bool]:
        """shared, vector, segmented, reverse: the constants that kernels are made for."""
        return self.shared, self.vector, self.segmented, self.reverse


def broadcast_strides(x: Tensor) -> tuple[int, int]:
    """Strides of batch and head of a contiguous tensor [b or 1, h or 1, ...]; 0 where there is one for all."""
    return x.stride(0) * (x.shape[0] > 1), x.stride(1) * (x.shape[1] > 1)


def build_gates(q: Tensor, log_decay: Tensor | None, starts: tuple[int, ...], chunk: int, reverse: bool) -> Gates:
    """The gates of the tokens of ``q`` [b, t, h, k], from log_decay of any of the four kinds."""
    tokens = q.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    first = tokens - 1 if reverse else 0
    gates = Gates(tokens, chunk, dtype, reverse, starts, first in starts, q)
    flags = _flags(gates, q.device) if any(start != first for start in starts) else None
    if log_decay is None or log_decay.dim() == 4:
        vector = None if log_decay is None else log_decay if log_decay.stride(-1) == 1 else log_decay.contiguous()
        return replace(gates, log_decay=vector, segments=None if flags is None else _segments(flags, chunk, reverse))
    if log_decay.dim() == 1:
        log_decay = log_decay[None, None].expand(1, tokens, -1)
    return _sum_up(gates, log_decay, flags)


def _sum_up(gates: Gates, log_decay: Tensor, flags: Tensor | None) -> Gates:
    """Sums, segments and totals of gates [b or 1, t, h] that all key channels share."""
    from seqpar.ops.decayed_linear_attention import kernel

    (b, tokens, h), chunks = log_decay.shape, gates.num_chunks
    sums = log_decay.new_empty(4, b, h, chunks * gates.chunk, dtype=gates.dtype)
    segments = log_decay.new_empty(b, h, chunks * gates.chunk, dtype=torch.int32)
    totals = log_decay.new_empty(b, h, chunks, dtype=gates.dtype)
    block = min(HEADS_OF_A_PROGRAM, 1 << (h - 1).bit_length())
    launch.launch(
        kernel.gate_sums_kernel,
        (chunks * -(-h // block) * b,),
        *(log_decay, segments if flags is None else flags, sums, segments, totals),
        *log_decay.stride(),
        *(tokens, chunks, h, sums.stride(0), gates.chunk, block),
        *(flags is not None, gates.reverse, gates.dtype == torch.float32),
        num_warps=4,
    )
    return replace(gates, sums=sums, segments=segments, totals=totals.unsqueeze(-1))


def _flags(gates: Gates, device: torch.device) -> Tensor:
    """1 for each token before which the state is reset, padded to whole chunks."""
    flags = torch.zeros(gates.num_chunks * gates.chunk, dtype=torch.int32)
    flags[list(gates.starts)] = 1
    return flags.to(device, non_blocking=True)


def _segments(flags: Tensor, chunk: int, reverse: bool) -> Tensor:
    """[1, 1, n * C]: number of starts from the first token of the chunk that the scan reads up to each."""
    chunks = flags.view(-1, chunk)
    chunks = chunks.flip(1).cumsum(1).flip(1) if reverse else chunks.cumsum(1)
    return chunks.to(torch.int32).view(1, 1, -1)


def documents_of(gates: Gates) -> Tensor | None:
    """int32 [t]: the number of each token's document; None: all belong to one."""
    if gates.segments is None and not any(gates.starts):
        return None
    flags = _flags(gates, gates.like.device)
    documents = flags.cumsum(0) - flags if gates.reverse else flags.cumsum(0)
    return documents[: gates.tokens].to(torch.int32)


def boundary_reach(gates: Gates, ascending: bool) -> Tensor:
    """What of a state before the first chunk enters each chunk, [b or 1, h or 1, n, 1 or k]; zero behind a start.

    The first chunk is the one of the first tokens if ``ascending``, else of the last.
    """
    totals = gates.totals
    if totals is None:
        totals = gates.like.new_zeros(1, 1, gates.num_chunks, 1, dtype=gates.dtype)
    nothing = torch.zeros_like(totals[:, :, :1])
    if ascending:
        reach = torch.cat([nothing, totals[:, :, :-1]], 2).cumsum(2).exp_()
    else:
        reach = torch.cat([nothing, totals[:, :, 1:].flip(2)], 2).cumsum(2).exp_().flip(2)
    if gates.starts and ascending:
        reach[:, :, gates.starts[0] // gates.chunk + 1 :] = 0
    elif gates.starts:
        reach[:, :, : gates.starts[-1] // gates.chunk] = 0
    return reach
