"""What is done to the scores of softmax attention besides scaling them: caps, biases by distance, sinks."""

import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from seqpar.collectives.planned import Planned, rows


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which column of a table a distance (position of the key minus that of the query) reads.

    Column ``columns[d - first]`` for distance d; beyond the first and the last one, theirs.
    """

    first: int
    columns: Planned

    @property
    def count(self) -> int:
        """How many columns there are."""
        return int(self.columns.array.max(initial=-1)) + 1

    @cached_property
    def digest(self) -> str:
        """A few letters that tell these from others."""
        columns = self.columns.array
        return hashlib.blake2b(f"{self.first} {columns.dtype}".encode() + columns.tobytes(), digest_size=8).hexdigest()

    @staticmethod
    def clipped(before: int, after: int) -> "Buckets":
        """A column for each distance from ``-before`` to ``after`` (Shaw et al., arXiv 1803.02155)."""
        return Buckets(-before, rows(np.arange(before + after + 1)))

    @staticmethod
    def t5(count: int, max_distance: int, bidirectional: bool) -> "Buckets":
        """Half of the columns for small distances, the rest spread logarithmically (T5, arXiv 1910.10683)."""
        distance = torch.arange(-max_distance, max_distance + 1)
        per_side = count // 2 if bidirectional else count
        away = distance.abs() if bidirectional else (-distance).clamp(min=0)
        exact = per_side // 2
        # In fp32, as published code: a bucket's edge must not move.
        spread = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (per_side - exact)
        far = (exact + spread.long()).clamp(max=per_side - 1)
        columns = torch.where(away < exact, away, far) + (distance > 0).long() * per_side * bidirectional
        return Buckets(-max_distance, rows(columns.numpy()))

    def of(self, distance: Tensor) -> Tensor:
        """The column of each distance."""
        columns = self.columns.on(distance.device)
        return columns[(distance - self.first).clamp(0, len(columns) - 1)]


@dataclass(frozen=True, eq=False)
class Scores:
    """How scores become weights: ``softmax(cap(scale * q.(k + embedding)) + bias)`` beside sinks.

    ``softcap``: scores stay between minus and plus this number, ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv
    2408.00118). ``sinks [h]``: a learned logit for each query head that takes its part of the softmax and gives nothing
    (gpt-oss, arXiv 2508.10925). ``slopes [h]``: a bias of minus the slope times how far query and key are apart (ALiBi,
    arXiv 2108.12409). ``table [h, r]``: a bias for each of the r columns of ``buckets`` (T5). ``embeddings [h, r, k]``:
    added to keys by bucket (Shaw et al.; Music Transformer, arXiv 1809.04281), at the cost of ``[b, t, h, r]`` numbers.
    Distances are those of positions in a document. ``factor [t]``: of the scores of each of my queries (Llama 4).

    All but ``factor`` are parameters: the same on every rank; a rank's gradient is that of its queries, a part of a sum
    over ranks.
    """

    softcap: float | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    embeddings: Tensor | None = None
    buckets: Buckets | None = None
    factor: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What is the same on every rank."""
        return self.sinks, self.slopes, self.table, self.embeddings

    @property
    def options(self) -> tuple[object, ...]:
        """What else is, as plain values."""
        buckets = None if self.buckets is None else self.buckets.digest
        return self.softcap, buckets, self.factor is not None

    @property
    def by_distance(self) -> bool:
        """Whether positions matter."""
        return any(each is not None for each in (self.slopes, self.table, self.embeddings))

    def check(self, q: Tensor) -> None:
        """Raise ``ValueError`` unless it fits queries ``[b, t, h, k]``."""
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a positive number, got {self.softcap}")
        heads, columns = q.shape[2], 0 if self.buckets is None else self.buckets.count
        if (self.buckets is None) != (self.table is None and self.embeddings is None):
            raise ValueError("a table or embeddings by distance need buckets, and buckets need one of them")
        for name, shape in (
            ("sinks", (heads,)),
            ("slopes", (heads,)),
            ("table", (heads, columns)),
            ("embeddings", (heads, columns, q.shape[3])),
            ("factor", (q.shape[1],)),
        ):
            got = getattr(self, name)
            if got is not None and got.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} for {heads} query heads, got {list(got.shape)}")

    def of_heads(self, heads: slice) -> "Scores":
        """Those of some query heads."""
        some = {name: getattr(self, name) for name in ("sinks", "slopes", "table", "embeddings")}
        return replace(self, **{name: x if x is None else x[heads] for name, x in some.items()})

    def terms(self, q: Tensor, scale: float) -> "Terms":
        """What my queries' scores get, before they are cut into tiles; differentiable."""
        relative = None
        if self.embeddings is not None:
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            relative = torch.einsum("bthk,hrk->bthr", q.to(dtype), self.embeddings.to(dtype)) * scale
        return Terms(self.softcap, self.slopes, self.table, relative, self.buckets)


@dataclass(frozen=True, eq=False)
class Terms:
    """What the scores of one block get: tensors as in :class:`Scores`, ``relative [b, n, h, r]`` by query and bucket.

    ``positions``: those of the queries ``[n]`` and of the keys ``[m]`` in their documents.
    """

    softcap: float | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    relative: Tensor | None = None
    buckets: Buckets | None = None
    positions: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def plain(self) -> bool:
        """Whether scores stay as they are."""
        return self.softcap is None and not self.by_distance

    @property
    def by_distance(self) -> bool:
        """Whether positions matter."""
        return any(each is not None for each in (self.slopes, self.table, self.relative))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient."""
        return self.slopes, self.table, self.relative

    def with_tensors(self, slopes: Tensor | None, table: Tensor | None, relative: Tensor | None) -> "Terms":
        """The same with other tensors."""
        return replace(self, slopes=slopes, table=table, relative=relative)

    def zeros(self, dtype: torch.dtype) -> "Terms":
        """Gradients to add to."""
        return self.with_tensors(*(None if x is None else torch.zeros_like(x, dtype=dtype) for x in self.tensors))

    def tile(self, rows: slice, keys: slice) -> "Terms":
        """Those of some queries and keys."""
        positions = None if self.positions is None else (self.positions[0][rows], self.positions[1][keys])
        return replace(self, relative=None if self.relative is None else self.relative[:, rows], positions=positions)

    def capped(self, scores: Tensor) -> Tensor:
        """Scaled scores ``[b, g, h // g, n, m]`` up to their cap; in place."""
        if self.relative is not None:
            column = self._column()
            relative = self.relative.to(scores.dtype).permute(0, 2, 1, 3)
            scores += relative.gather(3, column.expand(*relative.shape[:2], -1, -1)).view_as(scores)
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def biased(self, scores: Tensor) -> Tensor:
        """Capped scores as they enter the softmax; in place."""
        heads = scores.shape[1:3]
        if self.table is not None:
            scores += self.table.to(scores.dtype)[:, self._column()].unflatten(0, heads)
        if self.slopes is not None:
            scores -= (self.slopes.to(scores.dtype)[:, None, None] * self._distance().abs()).unflatten(0, heads)
        return scores

    def gradient(self, d_scores: Tensor, capped: Tensor, into: "Terms") -> Tensor:
        """The gradient of scaled scores from that of biased ones, in place; adds those of the terms to ``into``."""
        by_head = d_scores.flatten(1, 2)
        if into.table is not None:
            into.table.index_add_(1, self._column().flatten(), by_head.sum(0).flatten(1))
        if into.slopes is not None:
            into.slopes.sub_((by_head * self._distance().abs()).sum((0, 2, 3)))
        if self.softcap is not None:
            d_scores *= 1 - (capped / self.softcap).square_()
        if into.relative is not None:
            column = self._column().expand_as(by_head)
            into.relative.permute(0, 2, 1, 3).scatter_add_(3, column, by_head)
        return d_scores

    def _distance(self) -> Tensor:
        assert self.positions is not None
        return self.positions[1] - self.positions[0].unsqueeze(1)

    def _column(self) -> Tensor:
        assert self.buckets is not None
        return self.buckets.of(self._distance())


PLAIN = Terms()
