"""One micro-batch with given groups: who takes which document.

``assign`` is longest-processing-time-first by one of three keys; ``improve`` then moves and swaps documents of the
slowest group while that makes the micro-batch shorter.
"""

from collections.abc import Sequence

import numpy as np

from seqpar.planner.problem.costs import Floats, Ints, Table
from seqpar.planner.search.schedule import MicroBatch

KEYS = ("seconds", "memory", "both")
_ROUNDS = 200
_SWAPS = 60  # documents of the slowest group that are tried against all others


def assign(table: Table, kinds: Sequence[int], rows: Sequence[int], key: str) -> MicroBatch | None:
    """Put these documents, longest first, into groups of these kinds; None if one does not fit.

    ``"seconds"`` takes the group that would be done first, ``"memory"`` the fullest that still has room, and
    ``"both"`` the one whose larger share, of time or of memory, would be smallest.
    """
    kind = np.asarray(kinds)
    room = table.degrees[kind] * table.capacity
    loads, held = table.fixed[kind].astype(np.float64), np.zeros(len(kinds), np.int64)
    seconds = table.seconds[:, kind]
    target = float((table.area[list(rows)].min(axis=1).sum()) / table.devices + table.fixed.max())
    members: list[list[int]] = [[] for _ in kinds]
    for row in rows:
        after, tokens = loads + seconds[row], held + table.tokens[row]
        score = _score(key, after, tokens, room, target)
        score[tokens > room] = np.inf
        group = int(score.argmin())
        if not np.isfinite(score[group]):
            return None
        loads[group], held[group] = after[group], tokens[group]
        members[group].append(row)
    return tuple((int(k), tuple(rows)) for k, rows in zip(kinds, members) if rows)


def _score(key: str, after: Floats, tokens: Ints, room: Ints, target: float) -> Floats:
    if key == "seconds":
        return after
    if key == "memory":
        return np.where(after <= target, (room - tokens) / room, after / target)
    return np.maximum(after / target, tokens / room)


def makespan(table: Table, groups: MicroBatch) -> float:
    """Seconds of the slowest group; infinite for no groups at all."""
    return max((float(table.fixed[k] + table.seconds[list(rows), k].sum()) for k, rows in groups), default=np.inf)


def improve(table: Table, groups: MicroBatch, rounds: int = _ROUNDS) -> MicroBatch:
    """The same groups after moves and swaps out of the slowest, until none helps."""
    state = _State(table, groups)
    for _ in range(rounds):
        if not state.relieve():
            break
    return state.groups()


class _State:
    """Who is where, as arrays, for moves and swaps."""

    def __init__(self, table: Table, groups: MicroBatch) -> None:
        self.kind = np.asarray([kind for kind, _ in groups])
        self.rows = np.asarray([row for _, rows in groups for row in rows])
        self.at = np.repeat(np.arange(len(groups)), [len(rows) for _, rows in groups])
        self.seconds = table.seconds[self.rows][:, self.kind]  # [documents, groups]
        self.tokens = table.tokens[self.rows]
        self.loads = table.fixed[self.kind].astype(np.float64)
        np.add.at(self.loads, self.at, self.seconds[np.arange(len(self.rows)), self.at])
        self.free = table.degrees[self.kind] * table.capacity
        np.subtract.at(self.free, self.at, self.tokens)

    def relieve(self) -> bool:
        """The move or swap that leaves the slowest group and its partner fastest; False if none is faster than now."""
        slow = int(self.loads.argmax())
        mine = np.flatnonzero(self.at == slow)[:_SWAPS]
        limit = self.loads[slow] * (1 - 1e-9)
        move, to = self._best_move(slow, mine)
        swap, out, back = self._best_swap(slow, mine)
        if min(move, swap) >= limit:
            return False
        if move <= swap:
            self._shift(to[0], to[1])
        else:
            partner = int(self.at[back])
            self._shift(out, partner)
            self._shift(back, slow)
        return True

    def _best_move(self, slow: int, mine: Ints) -> tuple[float, tuple[int, int]]:
        if (self.at == slow).sum() < 2:
            return np.inf, (-1, -1)
        after = np.maximum(
            self.loads[None, :] + self.seconds[mine], (self.loads[slow] - self.seconds[mine, slow])[:, None]
        )
        after[:, slow] = np.inf
        after[self.tokens[mine][:, None] > self.free[None, :]] = np.inf
        best = int(after.argmin())
        row, group = divmod(best, after.shape[1])
        return float(after[row, group]), (int(mine[row]), group)

    def _best_swap(self, slow: int, mine: Ints) -> tuple[float, int, int]:
        others = np.flatnonzero(self.at != slow)
        if not len(others):
            return np.inf, -1, -1
        home = self.at[others]
        theirs = self.seconds[others, home]
        gone = self.loads[slow] - self.seconds[mine, slow][:, None] + self.seconds[others, slow][None, :]
        came = (self.loads[home] - theirs)[None, :] + self.seconds[np.ix_(mine, np.arange(self.seconds.shape[1]))][
            :, home
        ]
        after = np.maximum(gone, came)
        change = self.tokens[mine][:, None] - self.tokens[others][None, :]
        after[(change > self.free[home][None, :]) | (-change > self.free[slow])] = np.inf
        best = int(after.argmin())
        row, column = divmod(best, after.shape[1])
        return float(after[row, column]), int(mine[row]), int(others[column])

    def _shift(self, document: int, group: int) -> None:
        home = int(self.at[document])
        self.loads[home] -= self.seconds[document, home]
        self.loads[group] += self.seconds[document, group]
        self.free[home] += self.tokens[document]
        self.free[group] -= self.tokens[document]
        self.at[document] = group

    def groups(self) -> MicroBatch:
        rows = [tuple(sorted(self.rows[self.at == group].tolist())) for group in range(len(self.kind))]
        return tuple((int(kind), row) for kind, row in zip(self.kind, rows) if row)
