"""Packing documents under deadlines: who goes where if micro-batch i may take so many seconds.

The dual of the makespan problem (Hochbaum and Shmoys): given the seconds of every micro-batch, place the documents from
long to short, each where it costs the fewest device-seconds; groups open on demand, so degrees come out by themselves.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from seqpar.planner.problem.costs import Floats, Ints, Table
from seqpar.planner.search.schedule import MicroBatch

_POURED = 1 / 6  # documents below this share of a device's capacity are poured in after the others are placed
_TIGHTEST = 1e-9  # among groups of one price the fullest, and an open one before a new one


@dataclass
class Bins:
    """Groups: their kind, micro-batch, and the seconds and tokens still free; and devices free to open more.

    The first entries, one for each micro-batch and kind, are groups that could be opened and hold no documents.
    """

    kind: Ints
    degree: Ints
    weight: Floats  # device-seconds of a second: the degree, unless biased
    micro_batch: Ints
    free_seconds: Floats
    free_tokens: Ints
    free_devices: list[int]
    num_new: int
    documents: list[list[int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.num_new + len(self.documents)


def pack(table: Table, deadlines: Sequence[float], bias: Floats | None = None) -> tuple[MicroBatch, ...] | None:
    """Micro-batches that keep these deadlines, in their order (some may be empty); None if none was found.

    The work of a packing is near-linear in documents and groups, but with a bias, where all groups are looked through.
    ``bias`` [micro-batches, kinds] makes device-seconds of some groups look dearer or cheaper, to find other packings.
    """
    bins = _empty(table, deadlines)
    if bias is not None:
        bins.weight[: bins.num_new] *= bias.ravel()
    one_by_one = int((table.tokens > table.capacity * _POURED).sum())
    if not (_place_in_order(table, bins, one_by_one) if bias is None else _place_by_price(table, bins, one_by_one)):
        return None
    if one_by_one < table.num_documents and not _pour(table, bins, one_by_one):
        return None
    return _micro_batches(bins)


def _empty(table: Table, deadlines: Sequence[float]) -> Bins:
    kinds, count = len(table.degrees), len(deadlines)
    size = kinds * count + int(table.devices // table.degrees.min()) * count
    bins = Bins(
        kind=np.zeros(size, np.int64),
        degree=np.zeros(size, np.int64),
        weight=np.zeros(size),
        micro_batch=np.zeros(size, np.int64),
        free_seconds=np.zeros(size),
        free_tokens=np.zeros(size, np.int64),
        free_devices=[table.devices] * count,
        num_new=kinds * count,
    )
    bins.kind[: kinds * count] = np.tile(np.arange(kinds), count)
    bins.micro_batch[: kinds * count] = np.repeat(np.arange(count), kinds)
    opened = bins.kind[: kinds * count]
    bins.degree[: kinds * count] = bins.weight[: kinds * count] = table.degrees[opened]
    bins.free_seconds[: kinds * count] = np.repeat(np.asarray(deadlines, np.float64), kinds) - table.fixed[opened]
    bins.free_tokens[: kinds * count] = table.degrees[opened] * table.capacity
    return bins


def _place_by_price(table: Table, bins: Bins, documents: int) -> bool:
    """Put each of the first documents into the group, open or new, that spends the fewest device-seconds on it; of
    groups of one price into the fullest."""
    for document in range(documents):
        count = bins.count
        seconds = table.seconds[document][bins.kind[:count]]
        free = bins.free_seconds[:count]
        price = seconds * bins.weight[:count] + _TIGHTEST * free
        price[(seconds > free) | (bins.free_tokens[:count] < table.tokens[document])] = np.inf
        group = int(price.argmin())
        if price[group] == np.inf:
            return False
        _put(table, bins, document, _open(bins, group) if group < bins.num_new else group)
    return True


def _place_in_order(table: Table, bins: Bins, documents: int) -> bool:
    """The same without looking through all groups, where those of a kind have one price: the fullest of each that
    has the seconds is found by bisection.

    Groups without the tokens wait until documents, which come from long to short, are short enough.
    """
    ready: list[list[tuple[float, int]]] = [[] for _ in table.degrees]  # free seconds and group, by kind
    waiting = [(-int(bins.free_tokens[group]), group) for group in range(bins.num_new)]
    heapify(waiting)
    degrees, lengths = table.degrees.tolist(), table.tokens[:documents].tolist()
    for document, seconds in enumerate(table.seconds[:documents].tolist()):
        while waiting and -waiting[0][0] >= lengths[document]:
            group = heappop(waiting)[1]
            insort(ready[int(bins.kind[group])], (float(bins.free_seconds[group]), group))
        found = _fullest(bins, ready, degrees, seconds)
        if found is None:
            return False
        kind, at = found
        group = ready[kind][at][1]
        if group < bins.num_new:
            group = _open(bins, group)
        else:
            del ready[kind][at]
        _put(table, bins, document, group)
        heappush(waiting, (-int(bins.free_tokens[group]), group))
    return True


def _fullest(
    bins: Bins, ready: list[list[tuple[float, int]]], degrees: Sequence[int], seconds: Sequence[float]
) -> tuple[int, int] | None:
    """The kind, and the place among its groups that are ready, of the cheapest group that has these seconds."""
    best: tuple[float, int, int, int] | None = None
    for kind, (groups, degree, lasts) in enumerate(zip(ready, degrees, seconds)):
        at = bisect_left(groups, (lasts, -1))
        while at < len(groups) and groups[at][1] < bins.num_new and bins.free_tokens[groups[at][1]] < 0:
            del groups[at]  # a group that can be opened no more
        if at < len(groups):
            price = (lasts * degree + _TIGHTEST * groups[at][0], groups[at][1], kind, at)
            best = price if best is None else min(best, price)
    return None if best is None else best[2:]


def _put(table: Table, bins: Bins, document: int, group: int) -> None:
    bins.free_seconds[group] -= table.seconds[document, bins.kind[group]]
    bins.free_tokens[group] -= table.tokens[document]
    bins.documents[group - bins.num_new].append(document)


def _open(bins: Bins, new: int) -> int:
    """Open the group of this entry; entries of its micro-batch that no longer have the devices are closed."""
    group, micro_batch = bins.count, int(bins.micro_batch[new])
    for values in (bins.kind, bins.degree, bins.weight, bins.micro_batch, bins.free_seconds, bins.free_tokens):
        values[group] = values[new]
    bins.documents.append([])
    bins.free_devices[micro_batch] -= int(bins.degree[new])
    kinds = bins.num_new // len(bins.free_devices)
    entries = slice(micro_batch * kinds, (micro_batch + 1) * kinds)
    bins.free_tokens[entries][bins.degree[entries] > bins.free_devices[micro_batch]] = -1
    return group


def _pour(table: Table, bins: Bins, start: int) -> bool:
    """Fill all groups with the remaining short documents, cheap groups first, in passes until nothing moves."""
    kinds = bins.num_new // len(bins.free_devices)
    for micro_batch, devices in enumerate(bins.free_devices):
        for _ in range(min(devices // int(table.degrees[0]), table.num_documents - start)):
            _open(bins, micro_batch * kinds)
    used = np.unique(bins.kind[bins.num_new : bins.count]).tolist()
    seconds = {kind: [0.0, *np.cumsum(table.seconds[start:, kind]).tolist()] for kind in used}
    tokens = np.concatenate([[0], np.cumsum(table.tokens[start:])]).tolist()
    at, end = 0, table.num_documents - start
    order = _cheap_and_roomy(bins)
    while at < end:
        before = at
        for group in order:
            mine = seconds[int(bins.kind[group])]
            upto = min(_upto(mine, at, bins.free_seconds[group]), _upto(tokens, at, bins.free_tokens[group]))
            if upto > at:
                bins.free_seconds[group] -= mine[upto] - mine[at]
                bins.free_tokens[group] -= tokens[upto] - tokens[at]
                bins.documents[group - bins.num_new].extend(range(start + at, start + upto))
                at = upto
        if at == before:
            return False
    return True


def _cheap_and_roomy(bins: Bins) -> list[int]:
    """Open groups from small to large degree, those with the most seconds for their tokens first."""
    opened = slice(bins.num_new, bins.count)
    rate = bins.free_seconds[opened] / np.maximum(bins.free_tokens[opened], 1)
    return (np.lexsort((-rate, bins.degree[opened])) + bins.num_new).tolist()


def _upto(totals: list[float], at: int, room: float) -> int:
    """The largest end with ``totals[end] - totals[at] <= room``."""
    return bisect_right(totals, totals[at] + room, at + 1) - 1


def _micro_batches(bins: Bins) -> tuple[MicroBatch, ...]:
    batches: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in bins.free_devices]
    for group, documents in enumerate(bins.documents, start=bins.num_new):
        if documents:
            batches[int(bins.micro_batch[group])].append((int(bins.kind[group]), tuple(documents)))
    return tuple(tuple(groups) for groups in batches)
