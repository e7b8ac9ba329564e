"""Batches as transformers' collators make them: tokens, labels and the lengths of the packed documents."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

NOTHING = -100


class Packed(NamedTuple):
    """``tokens``, ``labels [b, s]``, not shifted, and the lengths of the documents in each row."""

    tokens: Tensor
    labels: Tensor | None
    lengths: list[int]


def packed(
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
) -> Packed:
    """A batch by transformers' names. Documents begin where ``position_ids`` are 0 (``DataCollatorWithFlattening``).

    Padding after the last token of a row is harmless, and has no labels. Raises ``ValueError`` for other padding, for
    masks of pairs of tokens, for a cache, and for rows that are packed in different ways.
    """
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("a cut model takes input_ids, and no embeddings in their place")
    if cache is not None or past_key_values is not None:
        raise ValueError("a cut model takes no cache of keys and values: it is for training; pass none")
    if attention_mask is not None:
        labels = _without_padding(input_ids, labels, attention_mask)
    return Packed(input_ids, labels, _lengths(input_ids, position_ids))


def _without_padding(tokens: Tensor, labels: Tensor | None, mask: Tensor) -> Tensor | None:
    if mask.shape != tokens.shape:
        raise ValueError(
            f"a cut model takes a mask of tokens {list(tokens.shape)}, got {list(mask.shape)}: which tokens see which "
            "follows from the documents: pass position_ids that restart"
        )
    if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ValueError("padding stands before or between tokens: pad on the right, or pack documents without padding")
    return None if labels is None else labels.masked_fill(~mask.bool(), NOTHING)


def _lengths(tokens: Tensor, positions: Tensor | None) -> list[int]:
    num_tokens = tokens.shape[1]
    if positions is None:
        return [num_tokens]
    if positions.dim() != 2 or positions.shape[1] != num_tokens or bool((positions != positions[:1]).any()):
        raise ValueError(f"rows must be packed alike: position_ids {list(positions.shape)} differ; pack into one row")
    first = positions[0]
    starts = (first == 0).nonzero().flatten()
    expected = torch.arange(num_tokens, device=first.device)
    if not len(starts) or int(starts[0]) or bool((first != expected - starts[(first == 0).cumsum(0) - 1]).any()):
        raise ValueError("position_ids must count from 0 in every document")
    bounds = [*starts.tolist(), num_tokens]
    return [stop - start for start, stop in pairwise(bounds)]
