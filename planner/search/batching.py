"""How many micro-batches and which documents in each: three ways, all over documents sorted by length.

``token_balanced`` is FlexSP's (arXiv 2412.01523, Eq. 23-24). ``time_optimal`` has the same shape, but minimises the
sum of the predicted seconds. ``long_short`` gives each micro-batch long documents and short ones. Each returns rows
of the table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from seqpar.planner.problem.costs import Floats, Ints, Table

Chunks = tuple[tuple[int, ...], ...]
_CUTS = 64
_DEADLINES = 96
_RUNS = 4096  # more documents are taken in so many runs of neighbours, each as its longest one goes


def fewest_micro_batches(table: Table) -> int:
    """No plan has fewer: all tokens over all that the devices can hold."""
    return -(-int(table.tokens.sum()) // (table.devices * table.capacity))


def area(table: Table, micro_batches: int) -> float:
    """A bound for so many micro-batches or more: fixed costs, and device-seconds over devices."""
    return micro_batches * float(table.fixed.min()) + float(table.area.min(axis=1).sum()) / table.devices


def token_balanced(table: Table, count: int) -> Chunks:
    """``count`` runs of documents of which the largest, in tokens, is as small as it can be."""
    cuts = _cuts(table)
    total = np.concatenate([[0], np.cumsum(table.tokens)])[cuts].astype(np.float64)
    return _chunks(cuts, _best_path(total[None, :] - total[:, None], count, np.maximum))


def time_optimal(table: Table, counts: Sequence[int]) -> list[tuple[Chunks, list[float]]]:
    """For each of these counts, runs of documents with the smallest sum of predicted seconds, and those seconds."""
    cuts = _cuts(table)
    counts = [count for count in counts if count < len(cuts)]
    costs = _interval_seconds(table, cuts) if counts else np.empty(0)
    found = []
    for count in counts:
        path = _best_path(costs, count, np.add)
        seconds = [float(costs[i, j]) for i, j in pairwise(path)]
        if path and np.isfinite(sum(seconds)):
            found.append((_chunks(cuts, path), seconds))
    return found


def long_short(table: Table, count: int) -> Chunks:
    """Micro-batches of equal tokens, half of them from the long end and half from the short end."""
    share = int(table.tokens.sum()) / (2 * count)
    tokens = table.tokens.tolist()
    chunks: list[tuple[int, ...]] = []
    low, high = 0, table.num_documents
    long_tokens = short_tokens = 0
    for index in range(1, count + 1):
        start, end = low, high
        while low < high and (index == count or long_tokens < index * share):
            long_tokens += tokens[low]
            low += 1
        while high > low and short_tokens < index * share:
            high -= 1
            short_tokens += tokens[high]
        chunks.append((*range(start, low), *range(high, end)))
    return tuple(chunk for chunk in chunks if chunk)


def _cuts(table: Table) -> Ints:
    """Where runs may start and end: everywhere for few documents, else after even shares of tokens and of documents."""
    n = table.num_documents
    if n <= _CUTS:
        return np.arange(n + 1)
    tokens = np.cumsum(table.tokens)
    by_tokens = np.searchsorted(tokens, np.linspace(0, tokens[-1], _CUTS // 2 + 1)[1:-1]) + 1
    by_count = np.geomspace(1, n, _CUTS // 2).astype(np.int64)
    return np.unique(np.concatenate([[0, n], by_tokens, by_count]))


def _best_path(costs: Floats, count: int, combine: Callable[[Floats, Floats], Floats]) -> list[int]:
    """The cuts 0 = c0 < c1 < ... < c_count with the smallest combined cost; empty if there are too few cuts."""
    size = len(costs)
    if count >= size:
        return []
    allowed = np.where(np.arange(size)[:, None] < np.arange(size)[None, :], costs, np.inf)
    best, parents = allowed[0], []
    for _ in range(count - 1):
        total = combine(best[:, None], allowed)
        parents.append(np.argmin(total, axis=0))
        best = total.min(axis=0)
    path = [size - 1]
    for parent in reversed(parents):
        path.append(int(parent[path[-1]]))
    path.append(0)
    path.reverse()
    return path if all(a < b for a, b in pairwise(path)) else []


def _chunks(cuts: Ints, path: list[int]) -> Chunks:
    return tuple(tuple(range(int(cuts[a]), int(cuts[b]))) for a, b in pairwise(path))


def _interval_seconds(table: Table, cuts: Ints) -> Floats:
    """Predicted seconds [start, end] of the documents between two cuts, from the devices that each deadline needs.

    Under a deadline every document takes the kind of group with the fewest device-seconds that keeps it. A degree then
    needs as many groups as its seconds or its tokens fill, and at least one if it has a document at all.
    """
    if len(table.degrees) == 1:
        return _seconds_of_one_kind(table, cuts)
    edges = np.unique(np.concatenate([cuts, np.linspace(0, table.num_documents, _RUNS + 1).astype(np.int64)]))
    runs, at = _in_runs(table, edges), np.searchsorted(edges, cuts)
    predicted = np.full((len(cuts), len(cuts)), np.inf)
    for deadline in _deadlines(table)[::-1]:
        devices = _devices_needed(table, runs, at, float(deadline))
        predicted = np.where(devices <= table.devices, deadline, predicted)
    return predicted


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of documents: the seconds of the longest [runs, kinds], and of all; how many there are, and their tokens."""

    longest: Floats
    seconds: Floats
    tokens: Floats
    count: Floats


def _in_runs(table: Table, edges: Ints) -> _Runs:
    """The documents between edges: each alone, where there are few."""
    starts, tokens = edges[:-1], table.tokens.astype(np.float64)
    return _Runs(
        longest=table.seconds[starts],
        seconds=np.add.reduceat(table.seconds, starts, axis=0),
        tokens=np.add.reduceat(tokens, starts),
        count=np.diff(edges).astype(np.float64),
    )


def _seconds_of_one_kind(table: Table, cuts: Ints) -> Floats:
    """The same without a search: as long as the longest document, and as all groups evenly."""
    seconds, held = table.seconds[:, 0], table.devices * table.capacity
    longest = np.append(seconds, 0.0)[cuts][:, None]
    evenly = _between(seconds, cuts) / (table.devices // table.degrees[0])
    fits = _between(table.tokens.astype(np.float64), cuts) <= held
    return np.where(fits, table.fixed[0] + np.maximum(longest, evenly), np.inf)


def _deadlines(table: Table) -> Floats:
    soonest = float((table.seconds + table.fixed).min(axis=1).max())
    low = min(soonest, float((table.fixed + table.seconds).min()))
    high = float(table.fixed.max() + table.area.min(axis=1).sum() / table.devices * 2 + soonest * 2)
    return np.geomspace(low, high, _DEADLINES)


def _devices_needed(table: Table, runs: _Runs, cuts: Ints, deadline: float) -> Floats:
    room = deadline - table.fixed
    area = np.where(runs.longest <= room[None, :], runs.longest * table.degrees, np.inf)
    choice = np.argmin(area, axis=1)
    late = ~np.isfinite(area[np.arange(len(choice)), choice])
    needed = _between(late * runs.count, cuts) * table.devices * 2
    for kind, degree in enumerate(table.degrees.tolist()):
        mine = (choice == kind) & ~late
        if not mine.any():
            continue
        seconds = _between(np.where(mine, runs.seconds[:, kind], 0.0), cuts)
        tokens = _between(np.where(mine, runs.tokens, 0.0), cuts)
        groups = np.maximum(seconds / max(room[kind], 1e-12), tokens / (degree * table.capacity))
        needed += degree * np.maximum(groups, tokens > 0)
    return needed


def _between(values: Floats, cuts: Ints) -> Floats:
    total = np.concatenate([[0.0], np.cumsum(values)])[cuts]
    return total[None, :] - total[:, None]
