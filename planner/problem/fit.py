"""A cost model from timed steps: what a group takes as a function of its documents, and how far off that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from seqpar.planner.problem.costs import Floats
from seqpar.planner.problem.problem import GroupKind

_UNKNOWNS = 3


@dataclass(frozen=True)
class Sample:
    """One timed forward and backward pass: ``degree`` ranks over ``transport`` took ``seconds`` for these documents."""

    degree: int
    transport: str
    lengths: tuple[int, ...]
    seconds: float

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ValueError(f"a sample's degree is at least 1, got {self.degree}")
        if not self.lengths or not all(length >= 1 for length in self.lengths):
            raise ValueError(f"a sample has documents of at least 1 token, got {list(self.lengths)!r:.60}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"a sample of {list(self.lengths)!r:.60} tokens took {self.seconds} seconds: expected a "
                             "finite number above 0")  # fmt: skip


@dataclass(frozen=True)
class FitError:
    """How far a kind of group is from its samples: relative errors, the mean and the largest of their sizes."""

    degree: int
    transport: str
    num_samples: int
    mean: float
    largest: float


@dataclass(frozen=True)
class Fit:
    """The kinds of groups that were seen, from small to large degree, and the error of each."""

    kinds: tuple[GroupKind, ...]
    errors: tuple[FitError, ...]

    @property
    def largest_error(self) -> float:
        """The largest relative error of all samples."""
        return max(error.largest for error in self.errors)


def fit(samples: Sequence[Sample]) -> Fit:
    """The costs of every degree and transport seen: ``a2 * sum(s**2) + a1 * sum(s) + b`` nearest to the samples.

    Law: no cost is negative, and no others of at least 0 have a smaller sum of squared *relative* errors, so a short
    step counts as much as a long one. The same samples in the same order give the same bits.

    A clock sees the sum only. How it is split is a convention: of the linear time, what goes beyond ``1 / degree`` of
    one device's is communication (``message_seconds``), and of the fixed time, what goes beyond one device's
    (``latency_seconds``); the rest, and all of the quadratic time, is computation. Without samples of degree 1 all of
    it is. ``hidden_seconds`` is 0: what a ring hides was hidden while it was timed.

    Raises ``ValueError`` if a degree and transport has too few samples, or lengths too much alike, to tell the three
    apart: time single documents of two lengths and one of them packed several times, at least.
    """
    if not samples:
        raise ValueError("no samples: time at least one kind of group")
    seen = sorted({(sample.degree, sample.transport) for sample in samples})
    lone = [key for key in seen if key[0] == 1]
    if len(lone) > 1:
        raise ValueError(f"one device has no transport to choose, but samples of degree 1 name {[t for _, t in lone]}")
    of = {key: [sample for sample in samples if (sample.degree, sample.transport) == key] for key in seen}
    found = {key: _costs(key, mine) for key, mine in of.items()}
    device = found[lone[0]] if lone else None
    kinds = tuple(_kind(key, found[key], device) for key in seen)
    return Fit(kinds, tuple(_error(kind, of[kind.degree, kind.transport]) for kind in kinds))


def seconds_of(kind: GroupKind, lengths: Sequence[int]) -> float:
    """What a group of this kind is predicted to take for these documents."""
    s = np.asarray(lengths, dtype=np.float64)
    message = np.maximum(kind.message_seconds * s - kind.hidden_seconds * s**2, 0.0)
    total = (kind.quadratic_seconds * s**2 + kind.linear_seconds * s + message).sum()
    return float(total) + kind.fixed_seconds + kind.latency_seconds


def _costs(key: tuple[int, str], samples: Sequence[Sample]) -> Floats:
    """a2, a1 and b of one degree and transport."""
    seconds = np.asarray([sample.seconds for sample in samples])
    s = [np.asarray(sample.lengths, dtype=np.float64) for sample in samples]
    matrix = np.stack([[(each**2).sum() for each in s], [each.sum() for each in s], np.ones(len(s))], axis=1)
    matrix /= seconds[:, None]
    matrix /= (scale := np.linalg.norm(matrix, axis=0))
    if len(samples) < _UNKNOWNS or np.linalg.matrix_rank(matrix) < _UNKNOWNS:
        raise ValueError(
            f"degree {key[0]} over {key[1]}: {len(samples)} samples cannot tell time per token, per squared token and "
            "per step apart: time documents of at least 3 lengths, or of 2 and several packed"
        )
    return _non_negative(matrix, np.ones(len(s))) / scale


def _non_negative(matrix: Floats, wanted: Floats) -> Floats:
    """The least-squares solution of at least 0: the best of those of all subsets of the columns that are (convexity:
    the optimum is the plain least-squares solution in the columns that it uses)."""
    best, smallest = np.zeros(matrix.shape[1]), float(wanted @ wanted)
    for count in range(1, matrix.shape[1] + 1):
        for columns in map(list, combinations(range(matrix.shape[1]), count)):
            part = np.linalg.lstsq(matrix[:, columns], wanted, rcond=None)[0]
            residual = float(((matrix[:, columns] @ part - wanted) ** 2).sum())
            if (part >= 0).all() and residual < smallest:
                best, smallest = np.zeros(matrix.shape[1]), residual
                best[columns] = part
    return best


def _kind(key: tuple[int, str], costs: Floats, device: Floats | None) -> GroupKind:
    degree, transport = key
    quadratic, linear, fixed = map(float, costs)
    computed, own = (linear, fixed) if device is None else (float(device[1]) / degree, float(device[2]))
    return GroupKind(
        degree=degree,
        transport=transport,
        quadratic_seconds=quadratic,
        linear_seconds=min(linear, computed),
        fixed_seconds=min(fixed, own),
        message_seconds=max(0.0, linear - computed),
        latency_seconds=max(0.0, fixed - own),
    )


def _error(kind: GroupKind, samples: Sequence[Sample]) -> FitError:
    errors = [abs(seconds_of(kind, sample.lengths) / sample.seconds - 1) for sample in samples]
    return FitError(kind.degree, kind.transport, len(samples), sum(errors) / len(errors), max(errors))
