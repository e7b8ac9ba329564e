"""Which tokens are mine: layouts, packed documents, positions. Integers only.

A packed sequence is a row of documents, one after the other. A layout deals its tokens to the ranks as *runs* (every
``step``-th token from ``start`` to ``stop``); cutting the runs at the document bounds gives *pieces*. Everything else
in the library reads these tables: no loop anywhere knows a layout by name.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives import Group, alone
from seqpar.collectives.agreed import agree
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import where
from seqpar.collectives.halo import Span
from seqpar.collectives.planned import Planned, rows
from seqpar.sharding.columns import Column, Columns, consecutive, counted, listed, numbers, striped

LAYOUTS = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class Run:
    """Global tokens ``start, start + step, ...`` before ``stop``."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True)
class Piece:
    """One document's tokens in one rank: ``count`` positions ``first, first + step, ...``, from row ``row`` on."""

    document: int
    first: int
    count: int
    step: int
    row: int

    def spans(self) -> list[Span]:
        """The piece as runs of consecutive positions."""
        if self.step == 1 or self.count == 1:
            return [Span(self.document, self.first, self.count)]
        return [Span(self.document, self.first + i * self.step, 1) for i in range(self.count)]


@dataclass(frozen=True)
class Shard:
    """The tokens of one rank of a packed sequence.

    Law: the shards of all ranks hold every token once. Any lengths (zero included), any number of ranks; a rank may
    hold nothing. Every rank knows the runs of every other, so who needs what is known without a message.
    """

    lengths: tuple[int, ...]
    layout: str
    runs: tuple[tuple[Run, ...], ...]
    group: Group = field(compare=False, repr=False)
    rank: int = 0

    @staticmethod
    def of(
        lengths: Sequence[int],
        group: Group,
        layout: str = "contiguous",
        fragments: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> "Shard":
        """Cut documents of ``lengths`` tokens, packed one after the other, over the ranks of ``group``.

        ``layout``: ``"contiguous"`` (rank r gets the r-th part), ``"zigzag"`` (2 n parts; rank r gets the r-th and the
        r-th from the end: balances causal attention) or ``"striped"`` (rank r gets tokens r, r + n, ...).
        ``fragments`` gives, instead, each rank's ``(start, stop)`` ranges of the packed sequence, ascending.
        Raises ``ValueError``, the same on every rank, for negative lengths, an unknown layout, or fragments that do
        not hold every token once.
        """
        tokens = _check_lengths(lengths, group)
        if fragments is not None:
            runs, layout = _check_fragments(fragments, sum(tokens), group), "fragments"
        elif layout in LAYOUTS:
            runs = _dealt(layout, group.size, sum(tokens))
        else:
            raise ValueError(f"{where(group)}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        return Shard(tokens, layout, runs, group, group.rank)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Of everything that makes two shards equal; plans are looked up by it in every call."""
        return hash((self.lengths, self.layout, self.runs, self.rank))

    @property
    def size(self) -> int:
        """How many ranks share the sequence."""
        return len(self.runs)

    @cached_property
    def contiguous(self) -> "Shard":
        """The same documents, each rank with the tokens that follow those of the rank before."""
        return Shard.of(self.lengths, self.group)

    @cached_property
    def together(self) -> "Shard":
        """The same documents on one rank, on its own."""
        return Shard(self.lengths, "contiguous", _dealt("contiguous", 1, self.num_tokens), alone())

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the whole packed sequence."""
        return sum(self.lengths)

    @property
    def num_local(self) -> int:
        """Tokens of this rank."""
        return self.num_of(self.rank)

    def num_of(self, rank: int) -> int:
        """Tokens of ``rank``."""
        return self.counts[rank]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of every rank."""
        return tuple(sum(len(run) for run in of_rank) for of_rank in self.runs)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each document starts in the packed sequence; one longer than ``lengths``."""
        return (0, *accumulate(self.lengths))

    def pieces_of(self, rank: int) -> tuple[Piece, ...]:
        """The pieces of ``rank``, in the order of its rows."""
        if rank not in self._pieces:
            self._pieces[rank] = _cut(self.runs[rank], self.offsets)
        return self._pieces[rank]

    @cached_property
    def _pieces(self) -> dict[int, tuple[Piece, ...]]:
        return {}

    @property
    def pieces(self) -> Columns:
        """The pieces of all ranks."""
        return _all_pieces(self.runs, self.lengths)

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Every rank's runs of consecutive tokens of one document, as :func:`seqpar.collectives.halo` wants them."""
        return tuple(
            tuple(span for piece in self.pieces_of(rank) for span in piece.spans()) for rank in range(self.size)
        )

    def indices_of(self, rank: int) -> Tensor:
        """``[tokens of rank]`` int64: the place of each of its rows in the packed sequence."""
        parts = [torch.arange(run.start, run.stop, run.step) for run in self.runs[rank]]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """``[t]`` int64: the position of each of my tokens in its own document."""
        return self.planned_positions.on(torch.device("cpu"))

    @cached_property
    def planned_positions(self) -> Planned:
        """The same, for any device."""
        tokens, offsets = tokens_of(self.runs[self.rank]), numbers(self.offsets)
        return rows(tokens - offsets[np.searchsorted(offsets, tokens, "right") - 1])

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """My rows of ``x``, which holds the whole packed sequence along ``dim``. Differentiable; sends nothing."""
        if x.shape[dim] != self.num_tokens:
            raise ValueError(
                f"{where(self.group)}: take expects {self.num_tokens} tokens (the sum of lengths) in dim {dim}, "
                f"got shape {list(x.shape)}"
            )
        index: list[Any] = [slice(None)] * x.dim()
        parts = []
        for run in self.runs[self.rank]:
            index[dim] = slice(run.start, run.stop, run.step)
            parts.append(x[tuple(index)])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def gather(self, local: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence from everyone's rows, in order: the inverse of :meth:`take`, the same on every rank.

        What follows is taken to be the same on every rank, so the gradient of ``local`` is my rows of the upstream
        gradient: it is not summed over ranks. Sends ``(n - 1)`` times my rows.
        """
        _agree_on_gather(self, local, dim)
        if local.shape[dim] != self.num_local:
            raise ValueError(
                f"{where(self.group)}: gather expects my {self.num_local} tokens in dim {dim}, "
                f"got shape {list(local.shape)}"
            )
        result: Tensor = _Gather.apply(local, self, dim)
        return result


@lru_cache(maxsize=32)
def digest_of(shard: Shard) -> str:
    """A few letters that tell this cut from others, the same on every rank."""
    runs = str(shard.runs) if shard.layout == "fragments" else ""
    lengths = numbers(shard.lengths).tobytes()
    hashed = hashlib.blake2b(f"{shard.layout} {shard.size} {runs}".encode() + lengths, digest_size=8).hexdigest()
    return f"{hashed} ({shard.layout}, {len(shard.lengths)} documents, {shard.num_tokens} tokens)"


def _agree_on_gather(shard: Shard, local: Tensor, dim: int) -> None:
    if shard.group.size > 1:
        kind = f"{local.dtype} {[*local.shape[:dim], 't', *local.shape[dim:][1:]]} {torch.is_grad_enabled()}"
        agree(shard.group, "Shard.gather", f"dim {dim}, {kind}, cut {digest_of(shard)}")


@lru_cache(maxsize=32)
def dealt(shard: Shard) -> Planned:
    """The places in the sequence of the rows of all ranks, one rank after the other."""
    return rows(tokens_of([run for of_rank in shard.runs for run in of_rank]))


@lru_cache(maxsize=32)
def in_sequence(shard: Shard) -> Planned:
    """Among the rows of all ranks, one rank after the other, those of the sequence in order."""
    if shard.layout == "striped":  # written in order, which memory likes better than a stride
        first, rounds = numbers([0, *accumulate(shard.counts[:-1])]), -(-shard.num_tokens // shard.size)
        return rows((first + np.arange(rounds)[:, None]).ravel()[: shard.num_tokens])
    order = np.empty(shard.num_tokens, np.int64)
    order[dealt(shard).array] = np.arange(shard.num_tokens)
    return rows(order)


def holders(shard: Shard, tokens: Column) -> tuple[Column, Column]:
    """Of tokens of the sequence: their ranks, and their rows there."""
    if shard.layout == "striped":
        return tokens % shard.size, tokens // shard.size
    if all(run.step == 1 for of_rank in shard.runs for run in of_rank):
        pieces = shard.pieces
        which = np.searchsorted(pieces.token, tokens, "right") - 1
        return pieces.rank[which], pieces.row[which] + tokens - pieces.token[which]
    rank, row = np.empty((2, shard.num_tokens), np.int64)
    counts = numbers(shard.counts)
    rank[dealt(shard).array], row[dealt(shard).array] = np.repeat(np.arange(shard.size), counts), counted(counts)
    return rank[tokens], row[tokens]


@first_order("Shard.gather")
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, shard: Shard, dim: int) -> Tensor:
        ctx.shard, ctx.dim = shard, dim
        mine = local.movedim(dim, 0).contiguous()
        shapes = [(count, *mine.shape[1:]) for count in shard.counts]
        parts = torch.cat(shard.group.all_gather(mine, shapes).wait())
        return parts[in_sequence(shard).on(mine.device)].movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.shard.take(grads[0], ctx.dim), None, None


def _check_lengths(lengths: Sequence[int], group: Group) -> tuple[int, ...]:
    if not (isinstance(getattr(group, "rank", None), int) and isinstance(getattr(group, "size", None), int)):
        raise ValueError(f"a shard takes a Group: seqpar.group_of makes one of a mesh or process group, got {group!r}")
    numbers = [int(length) for length in lengths]
    if any(number != length for number, length in zip(numbers, lengths)):
        raise ValueError(f"{where(group)}: lengths must be whole numbers, got {list(lengths)}")
    if any(number < 0 for number in numbers):
        worst = min(range(len(numbers)), key=lambda i: numbers[i])
        raise ValueError(f"{where(group)}: lengths must not be negative, document {worst} has {numbers[worst]}")
    return tuple(numbers)


def _check_fragments(
    fragments: Sequence[Sequence[tuple[int, int]]], num_tokens: int, group: Group
) -> tuple[tuple[Run, ...], ...]:
    if len(fragments) != group.size:
        raise ValueError(f"{where(group)}: fragments must list {group.size} ranks, got {len(fragments)}")
    ranges = sorted((start, stop) for of_rank in fragments for start, stop in of_rank if start < stop)
    reached = 0
    for start, stop in ranges:
        if start != reached:
            fault = f"token {reached} is missing" if start > reached else f"token {start} is there twice"
            raise ValueError(f"{where(group)}: fragments must hold every token once, but {fault}")
        reached = stop
    if reached != num_tokens:
        raise ValueError(f"{where(group)}: fragments hold {reached} tokens, the documents {num_tokens}")
    return tuple(tuple(Run(start, stop) for start, stop in of_rank if start < stop) for of_rank in fragments)


@lru_cache(maxsize=64)
def _dealt(layout: str, size: int, num_tokens: int) -> tuple[tuple[Run, ...], ...]:
    """The runs of every rank."""
    return tuple(_deal(layout, rank, size, num_tokens) for rank in range(size))


def _deal(layout: str, rank: int, size: int, num_tokens: int) -> tuple[Run, ...]:
    """The runs of ``rank``."""
    if layout == "striped":
        runs = [Run(rank, num_tokens, size)]
    elif layout == "zigzag":
        runs = [part(chunk, 2 * size, num_tokens) for chunk in (rank, 2 * size - 1 - rank)]
    else:
        runs = [part(rank, size, num_tokens)]
    return tuple(run for run in runs if len(run))


def part(index: int, parts: int, num_tokens: int) -> Run:
    """The ``index``-th of ``parts`` parts of the sequence; they differ by at most one token."""
    return Run(num_tokens * index // parts, num_tokens * (index + 1) // parts)


def tokens_of(runs: Sequence[Run]) -> np.ndarray:
    """The tokens of some runs, in the order of their rows."""
    parts = [np.arange(run.start, run.stop, run.step) for run in runs]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _cut(runs: Sequence[Run], offsets: Sequence[int]) -> tuple[Piece, ...]:
    """Cut runs at the document bounds; documents without a token here are not looked at."""
    pieces, row = [], 0
    for run in runs:
        token = run.start
        while token < run.stop:
            document = bisect_right(offsets, token) - 1
            start, stop = offsets[document], min(offsets[document + 1], run.stop)
            count = -(-(stop - token) // run.step)
            pieces.append(Piece(document, token - start, count, run.step, row))
            row += count
            token += count * run.step
    return tuple(pieces)


@lru_cache(maxsize=8)
def _all_pieces(runs: tuple[tuple[Run, ...], ...], lengths: tuple[int, ...]) -> Columns:
    """The pieces of all ranks, which share them."""
    offsets, size = [0, *accumulate(lengths)], len(runs)
    if all(run.step == 1 for of_rank in runs for run in of_rank):
        bounds = [(run.start, run.stop, rank) for rank, of_rank in enumerate(runs) for run in of_rank]
        return consecutive(bounds, offsets)
    if runs == _dealt("striped", size, offsets[-1]):
        return striped(size, offsets)
    return listed([_cut(of_rank, offsets) for of_rank in runs], offsets)
