"""Depthwise convolutions tap by tap: rows moved past each other, multiplied and added, zeros where documents meet.

Documents lie side by side, with nothing between them, so many short ones take no more rows than a long one, and each
tap is a product of two views. (Zeros before every document would be more rows than tokens where documents are short,
and a library's depthwise convolution wants channels first: on one CPU thread it takes three times as long.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from seqpar.crossing.convolution_plan import Reach, rows_apart

MOST = 16  # taps; more of them are quicker in one call


def fits(weight: Tensor | None, reach: Reach) -> bool:
    """Whether a convolution is one of few taps, each with a number per channel (without weights: with none)."""
    return reach.width is None and (weight is None or (weight.dim() == 2 and weight.shape[1] <= MOST))


def moved(rows: Tensor, reach: Reach, outside: tuple[Tensor, ...]) -> Tensor:
    """Of each row the one that is farthest: ``reach.left`` before it, or ``reach.right`` after it."""
    (shift, hidden), found = (-reach.left or reach.right, outside[0 if reach.left else -1]), torch.zeros_like(rows)
    here, there = rows_apart(rows.shape[1], shift)
    found[:, here] = rows[:, there]
    found[:, here].index_fill_(1, hidden, 0)
    return found


def outputs(rows: Tensor, weight: Tensor, bias: Tensor | None, reach: Reach, outside: tuple[Tensor, ...]) -> Tensor:
    """``bias + sum_i weight[:, i] rows[r - reach.left + i]`` of every row ``[b, rows, d]``, summed in fp32 (fp64)."""
    exact = _exact(rows)
    wide, taps = rows.to(exact), weight.to(exact).unbind(1)
    own = taps[reach.left]
    found = wide * own if bias is None else torch.addcmul(bias.to(exact), wide, own)
    for here, there, hidden, place in _taps(rows, reach, outside):
        kept = found[:, here].index_select(1, hidden)  # few rows, put back as they were: what they see may be NaN
        found[:, here].addcmul_(wide[:, there], taps[place]).index_copy_(1, hidden, kept)
    return found.to(rows.dtype)


def weight_gradient(
    rows: Tensor, upstream: Tensor, weight: Tensor, reach: Reach, outside: tuple[Tensor, ...]
) -> Tensor:
    """``sum_r rows[r - reach.left + i] upstream[r]`` of every tap ``i``, ``[d, w]``."""
    rows, upstream = rows.to(_exact(rows)), upstream.to(_exact(rows))
    found = torch.zeros(weight.shape, dtype=rows.dtype, device=rows.device)
    found[:, reach.left] = (rows * upstream).sum((0, 1))
    for here, there, hidden, place in _taps(rows, reach, outside):
        found[:, place] = (rows[:, there] * upstream[:, here]).index_fill_(1, hidden, 0).sum((0, 1))
    return found.to(weight.dtype)


def _taps(rows: Tensor, reach: Reach, outside: tuple[Tensor, ...]) -> Iterator[tuple[slice, slice, Tensor, int]]:
    """Of each tap but the row's own: rows that see, rows seen, which of those pairs are hidden, and its place."""
    for place, hidden in enumerate(outside):
        shift = place - reach.left
        if shift and abs(shift) < rows.shape[1]:
            yield *rows_apart(rows.shape[1], shift), hidden, place


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
