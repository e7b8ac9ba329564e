"""The problem as arrays: seconds of every document in every kind of group, longest document first."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seqpar.planner.problem.problem import Problem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows are documents from long to short (``order`` gives their place in the input), columns are kinds of groups.

    ``seconds`` [documents, kinds] leaves out the fixed cost and is infinite where the document does not fit.
    """

    order: Ints
    tokens: Ints
    seconds: Floats
    degrees: Ints
    fixed: Floats
    capacity: int
    devices: int

    @property
    def num_documents(self) -> int:
        return len(self.tokens)

    @property
    def area(self) -> Floats:
        """Device-seconds of every document in every kind of group."""
        return self.seconds * self.degrees

    def rows(self, documents: Ints) -> "Table":
        """The same for these rows only, in this order."""
        return Table(self.order[documents], self.tokens[documents], self.seconds[documents],
                     self.degrees, self.fixed, self.capacity, self.devices)  # fmt: skip


def table(problem: Problem) -> Table:
    """The table of a problem, with the kinds from small to large degree."""
    lengths = np.asarray(problem.lengths, dtype=np.int64)
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    kinds = problem.costs.kinds
    tokens = lengths[order]
    s = tokens.astype(np.float64)[:, None]
    compute = (
        _row([kind.quadratic_seconds for kind in kinds]) * s**2 + _row([kind.linear_seconds for kind in kinds]) * s
    )
    message = _row([kind.message_seconds for kind in kinds]) * s - _row([kind.hidden_seconds for kind in kinds]) * s**2
    degrees = np.asarray([kind.degree for kind in kinds], dtype=np.int64)
    seconds = compute + np.maximum(message, 0.0)
    seconds[tokens[:, None] > degrees[None, :] * problem.capacity] = np.inf
    return Table(
        order=order,
        tokens=tokens,
        seconds=seconds,
        degrees=degrees,
        fixed=np.asarray([kind.fixed_seconds + kind.latency_seconds for kind in kinds]),
        capacity=problem.capacity,
        devices=problem.cluster.devices,
    )


def _row(values: list[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)[None, :]
