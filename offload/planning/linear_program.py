"""Small linear programs through PuLP: build, solve by HiGHS (else CBC), and read values only of a proven optimum."""

import importlib.util
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from seqpar.offload.quiet_highs import quiet_highs

INSTALL = "pip install 'seqpar[planner]'"
_SECONDS = 3600  # of the wall: these programs take milliseconds, on a busy machine too; so that nothing hangs
_OTHERS = ("COIN_CMD", "PULP_CBC_CMD")


@dataclass
class LinearProgram:
    """Minimise a linear cost over variables by number, each within its bounds, under rows ``terms <= high``."""

    cost: list[float] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list)
    equal: list[tuple[dict[int, float], float]] = field(default_factory=list)

    def variable(self, cost: float, low: float = 0.0, high: float = math.inf) -> int:
        """Add a variable; returns its number."""
        self.cost.append(cost)
        self.bounds.append((low, high))
        return len(self.cost) - 1

    def at_most(self, terms: dict[int, float], high: float) -> None:
        """Add ``sum of value * variable <= high``; nothing if ``high`` is infinite."""
        if math.isfinite(high):
            self.rows.append((terms, high))

    def equals(self, terms: dict[int, float], value: float) -> None:
        """Add ``sum of value * variable == value``."""
        self.equal.append((terms, value))


def solver_name() -> str | None:
    """The solver that ``solve`` would use: HiGHS, else CBC; None without PuLP or without either."""
    if importlib.util.find_spec("pulp") is None:
        return None
    if importlib.util.find_spec("highspy") is not None:
        return "HiGHS"
    import pulp

    available = pulp.listSolvers(onlyAvailable=True)
    return next((name for name in _OTHERS if name in available), None)


def solve(program: LinearProgram) -> tuple[float, ...] | None:
    """The values of all variables at the optimum; None if no values satisfy the rows.

    Raises ``ValueError`` without a solver, saying what to install.
    """
    name = solver_name()
    if name is None:
        raise ValueError(f"strategy 'auto' needs PuLP and highspy: {INSTALL}; the other strategies need neither")
    import pulp

    problem, variables = _build(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "HiGHS":
            result = problem.solve(quiet_highs({"threads": 1, "time_limit": float(_SECONDS)}))
        else:
            result = problem.solve(pulp.getSolver(name, msg=False, timeLimit=_SECONDS))
    if not _optimal(problem, result):
        return None
    return tuple(float(variable.varValue or 0.0) for variable in variables)


def _build(program: LinearProgram) -> tuple[Any, list[Any]]:
    # PuLP 4 has to be imported before highspy: it loads HiGHS in a way that both can share.
    import pulp

    problem = pulp.LpProblem("swap", pulp.LpMinimize)
    variables = [
        problem.add_variable(f"x{number:04d}", low, high if math.isfinite(high) else None, pulp.LpContinuous)
        for number, (low, high) in enumerate(program.bounds)
    ]
    problem += pulp.lpSum(cost * variable for cost, variable in zip(program.cost, variables))
    for terms, high in program.rows:
        problem += pulp.lpSum(value * variables[number] for number, value in terms.items()) <= high
    for terms, total in program.equal:
        problem += pulp.lpSum(value * variables[number] for number, value in terms.items()) == total
    return problem, variables


def _optimal(problem: Any, result: Any) -> bool:
    """Whether the run ended at an optimum; without one, the values of variables are noise.

    In PuLP 3.3 a run cut short still has the status "optimal", and only ``sol_status`` tells; PuLP 4 returns both.
    """
    import pulp

    if hasattr(result, "has_solution"):
        return bool(result.has_solution) and int(result.status) == 1
    return bool(problem.sol_status == pulp.LpSolutionOptimal)
