"""Convolutions over packed documents, token by token and tap by tap; autograd gives the gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


def documents(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The tokens of each document, as a list of [b, d]."""
    tokens, parts, start = x.unbind(1), [], 0
    for length in lengths:
        parts.append(list(tokens[start : start + length]))
        start += length
    assert start == x.shape[1], "the lengths must add up to the tokens"
    return parts


def tap(weight: Tensor, token: Tensor) -> Tensor:
    """One tap, [d] or [d', d], on one token [b, d]."""
    return token * weight if weight.dim() == 1 else token @ weight.T


def packed(outputs: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape[0], 0, weight.shape[0])
    return out if bias is None else out + bias


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Sequence[int],
    left: int,
    initial: Tensor | None = None,
) -> Tensor:
    """``y_t = bias + sum_i weight[..., i] x_(t - left + i)`` within each document; before the first stand the rows of
    ``initial`` [b, left, d]. ``weight`` is [d, w] or [d', d, w]."""
    taps = weight.unbind(-1)
    outputs = []
    for number, document in enumerate(documents(x, lengths)):
        for position in range(len(document)):
            y = x.new_zeros(x.shape[0], weight.shape[0])
            for i, weights in enumerate(taps):
                source = position - left + i
                if 0 <= source < len(document):
                    y = y + tap(weights, document[source])
                elif source < 0 and number == 0 and initial is not None:
                    y = y + tap(weights, initial[:, source])
            outputs.append(y)
    return packed(outputs, x, weight, bias)


def last_inputs(x: Tensor, depth: int, lengths: Sequence[int], initial: Tensor | None = None) -> Tensor:
    """The last ``depth`` inputs of the last document, [b, depth, d]: zeros before its start, or ``initial``."""
    document = documents(x, lengths)[-1]
    zeros = [x.new_zeros(x.shape[0], x.shape[2])] * depth
    before = list(initial.unbind(1)) if initial is not None and len(lengths) == 1 else zeros
    found = [*before, *document][len(document) :]
    return torch.stack(found, 1) if depth else x.new_zeros(x.shape[0], 0, x.shape[2])


def grid_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, lengths: Sequence[int], width: int
) -> Tensor:
    """Each document is a grid of ``width`` columns; ``weight [d, kh, kw]`` is centred on each of its tokens."""
    kh, kw = weight.shape[1:]
    outputs = []
    for document in documents(x, lengths):
        for position in range(len(document)):
            y = torch.zeros_like(x[:, 0])
            for i in range(kh):
                for j in range(kw):
                    row, column = position // width + i - kh // 2, position % width + j - kw // 2
                    if 0 <= row < len(document) // width and 0 <= column < width:
                        y = y + tap(weight[:, i, j], document[row * width + column])
            outputs.append(y)
    return packed(outputs, x, weight, bias)


def shifted(x: Tensor, lengths: Sequence[int], initial: Tensor | None = None) -> Tensor:
    """For each token the one before it in its document."""
    outputs: list[Tensor] = []
    for number, document in enumerate(documents(x, lengths)):
        first = initial[:, 0] if initial is not None and number == 0 else torch.zeros_like(x[:, 0] if len(x[0]) else x)
        outputs += [first, *document][: len(document)]
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
