"""Linear programs as sparse arrays, solved by HiGHS where it is installed."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seqpar.planner.problem.costs import Floats, Ints
from seqpar.planner.quiet_highs import quiet_model

INFINITY = float("inf")
_HANG_SECONDS = 3600.0  # of the wall: these programs take milliseconds


def lp_available() -> bool:
    """Whether linear programs can be solved here (highspy is installed)."""
    return importlib.util.find_spec("highspy") is not None


@dataclass
class LinearProgram:
    """Minimise ``cost @ x`` with bounds on x and on rows, both added in blocks; ``solution`` is x, once solved."""

    cost: list[Floats] = field(default_factory=list)
    column_bounds: list[Floats] = field(default_factory=list)
    row_bounds: list[tuple[float, float]] = field(default_factory=list)
    indices: list[Ints] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    num_columns: int = 0
    solution: Floats | None = None

    def columns(self, count: int, cost: float = 0.0, low: float = 0.0, high: float = INFINITY) -> Ints:
        """Add so many variables; returns their numbers."""
        self.cost.append(np.full(count, cost))
        self.column_bounds.append(np.tile([[low], [high]], count))
        self.num_columns += count
        return np.arange(self.num_columns - count, self.num_columns)

    def row(self, low: float, high: float, *terms: tuple[Ints | int, Floats | float]) -> None:
        """Add ``low <= sum of value * variable <= high``."""
        places = [np.atleast_1d(np.asarray(index, np.int64)) for index, _ in terms]
        values = [
            np.broadcast_to(np.asarray(value, np.float64), place.shape) for place, (_, value) in zip(places, terms)
        ]
        self.row_bounds.append((low, high))
        self.indices.append(np.concatenate(places))
        self.values.append(np.concatenate(values))

    def solve(self) -> float:
        """The smallest cost; infinite if there is no solution, minus infinite if HiGHS could not tell."""
        import highspy

        solver = quiet_model({"threads": 1, "time_limit": _HANG_SECONDS})
        solver.passModel(self._model())
        solver.run()
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kOptimal:
            self.solution = np.asarray(solver.getSolution().col_value)
            return float(solver.getInfo().objective_function_value)
        return INFINITY if status == highspy.HighsModelStatus.kInfeasible else -INFINITY

    def _model(self) -> Any:
        import highspy

        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = self.num_columns, len(self.row_bounds)
        model.col_cost_ = np.concatenate(self.cost)
        model.col_lower_, model.col_upper_ = np.concatenate(self.column_bounds, axis=1)
        model.row_lower_, model.row_upper_ = np.asarray(self.row_bounds).T
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.concatenate([[0], np.cumsum([len(row) for row in self.indices])])
        model.a_matrix_.index_ = np.concatenate(self.indices)
        model.a_matrix_.value_ = np.concatenate(self.values)
        return model
