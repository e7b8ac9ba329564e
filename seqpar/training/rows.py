"""Rows of a batch with documents of their own, put one after the other into one row; padding is left out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How rows were put together.

    Law: attention, states and losses see documents, so what a model computes of a token is what it computed where the
    token stood in its row. ``shape``: rows and tokens in each; ``places``: where in ``[rows * tokens]`` each token of
    the one row comes from; ``lengths``: its documents.
    """

    shape: tuple[int, int]
    lengths: tuple[int, ...]
    places: Tensor = field(compare=False, repr=False)

    def packed(self, x: Tensor) -> Tensor:
        """``[rows, tokens, ...]`` (or ``[1, tokens, ...]``, the same for all rows) as ``[1, all tokens, ...]``."""
        whole = x.expand(self.shape[0], *x.shape[1:]) if x.shape[0] == 1 else x
        return whole.flatten(0, 1)[self.places.to(x.device)][None]

    def unpacked(self, x: Tensor) -> Tensor:
        """``[1, all tokens, ...]`` as ``[rows, tokens, ...]``, zeros where rows are padded. Differentiable."""
        rows, tokens = self.shape
        into = x.new_zeros(rows * tokens, *x.shape[2:])
        return into.index_copy(0, self.places.to(x.device), x[0]).unflatten(0, (rows, tokens))


def per_row(lengths: Any) -> bool:
    """Whether there is a list of lengths for each row."""
    return isinstance(lengths, Sequence) and len(lengths) > 0 and all(isinstance(row, Sequence) for row in lengths)


def rows_of(shape: tuple[int, int], lengths: Sequence[Sequence[int]] | None, mask: Tensor | None, who: str) -> Rows:
    """The rows of a batch ``[b, s]`` by the lengths of each row's documents, by a mask of padding, or by both.

    ``mask [b, s]``: true (1) where there are tokens; padding is on either side of a row, not within. Without lengths a
    row is one document; with them, they say how its tokens are divided. Raises ``ValueError`` for what does not fit.
    """
    tokens = torch.ones(shape, dtype=torch.bool) if mask is None else _tokens(mask, shape, who)
    counts = tokens.sum(1).tolist()
    documents = [[count] for count in counts] if lengths is None else [list(map(int, row)) for row in lengths]
    if len(documents) != shape[0]:
        raise ValueError(f"{who}: lengths must be a list for each of {shape[0]} rows, got {len(documents)} lists")
    for number, (row, count) in enumerate(zip(documents, counts)):
        if min(row, default=0) < 0 or sum(row) != count:
            raise ValueError(
                f"{who}: lengths of row {number} must be at least 0 and sum to its {count} tokens, got {row}"
            )
    together = tuple(length for row in documents for length in row)
    return Rows(shape, together, tokens.flatten().nonzero().flatten())


def _tokens(mask: Tensor, shape: tuple[int, int], who: str) -> Tensor:
    """The mask as booleans, on the CPU."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{who}: attention_mask must be [{shape[0]}, {shape[1]}], 1 where there are tokens and 0 where a row is "
            f"padded, got {given}; what else a token must not see is said by lengths and by the layers"
        )
    known = mask.detach().cpu()
    tokens = known != 0
    if not bool((tokens.to(known.dtype) == known).all()):
        raise ValueError(f"{who}: attention_mask must hold 0 and 1 only (or booleans)")
    changes = (tokens[:, 1:] & ~tokens[:, :-1]).sum(1) + tokens[:, 0].long() if shape[1] else tokens.sum(1)
    torn = (changes > 1).nonzero().flatten().tolist()
    if torn:
        raise ValueError(
            f"{who}: attention_mask may hide the ends of a row, not what is between tokens, as in row {torn[0]}: say "
            "by lengths what belongs together"
        )
    return tokens
