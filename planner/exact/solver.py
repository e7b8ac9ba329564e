"""Mixed-integer programs through PuLP: one small adapter over PuLP 3.3 and 4.x, and over HiGHS, CBC and SCIP.

PuLP builds the program. HiGHS runs inside this process, with a start and limits that PuLP 3.3 does not pass on, and
tells its own bound; CBC and SCIP are PuLP's business. No variable is read before the solver has said that it holds a
solution.
"""

import contextlib
import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from seqpar.planner.quiet_highs import quiet_highs

INFINITY = float("inf")
_HANG_SECONDS = 3600.0  # of the wall: what nothing here takes, so that a solver that hangs ends all the same
# Heuristics that solve whole programs between two looks; where a start is known, they are not missed.
_WITHOUT_LOOKS = ("mip_heuristic_run_rens", "mip_heuristic_run_rins", "mip_heuristic_run_root_reduced_cost")
_OTHERS = ("COIN_CMD", "PULP_CBC_CMD", "SCIP_PY", "SCIP_CMD")


@dataclass
class Program:
    """Minimise a linear cost; variables by number, each with its bounds, and rows ``low <= terms <= high``."""

    cost: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float, dict[int, float]]] = field(default_factory=list)

    def variable(self, cost: float, low: float, high: float, integer: bool) -> int:
        """Add a variable; returns its number."""
        self.cost.append(cost)
        self.low.append(low)
        self.high.append(high)
        self.integer.append(integer)
        return len(self.cost) - 1

    def row(self, low: float, high: float, terms: dict[int, float]) -> None:
        """Add ``low <= sum of value * variable <= high``."""
        self.rows.append((low, high, terms))


@dataclass(frozen=True)
class Limits:
    """When a solver must stop: after so many nodes or looks, which are the same on every machine.

    A look is one of the moments between relaxations when HiGHS asks whether to go on; other solvers do not ask, and get
    what the looks are worth in ``looks_seconds``. ``seconds`` are the guard behind all that. Both are not the wall's
    seconds but the processor's, for HiGHS as ``clock`` counts them.
    """

    nodes: int
    looks: float = INFINITY
    looks_seconds: float = INFINITY
    seconds: float = INFINITY
    clock: Callable[[], float] = time.thread_time


@dataclass(frozen=True)
class Answer:
    """What a solver found: values of all variables, if any; whether they are optimal; a bound below all solutions.

    ``out_of_time`` says that the guard ended it, after so many ``looks``, and not its nodes or looks.
    """

    values: tuple[float, ...] | None
    optimal: bool
    bound: float
    solver: str
    out_of_time: bool
    looks: int = 0


@dataclass
class _Told:
    """What HiGHS says of itself after a run, how often it asked whether to go on, and whether the guard stopped it."""

    answer: Answer | None = None
    looks: int = 0
    late: bool = False


def solver_name() -> str | None:
    """The solver that ``solve`` would use: HiGHS, else CBC or SCIP; None if PuLP or all of them are missing."""
    if importlib.util.find_spec("pulp") is None:
        return None
    if importlib.util.find_spec("highspy") is not None:
        return "HiGHS"
    import pulp

    available = pulp.listSolvers(onlyAvailable=True)
    return next((name for name in _OTHERS if name in available), None)


def solve(program: Program, start: Sequence[float] | None, limits: Limits) -> Answer:
    """Solve by the solver of ``solver_name``, from a start if there is one."""
    name = solver_name()
    if name is None:
        raise ValueError("no solver: install PuLP and highspy (pip install 'seqpar[planner]')")
    problem, variables = _build(program)
    if name == "HiGHS":
        return _solve_highs(problem, start, limits)
    return _solve_other(problem, variables, start, limits, name)


def _build(program: Program) -> tuple[Any, list[Any]]:
    # PuLP 4 has to be imported before highspy: it loads HiGHS in a way that both can share.
    import pulp

    problem = pulp.LpProblem("plan", pulp.LpMinimize)
    # Solvers see the variables by name or by number; names that sort like numbers make that the same.
    variables = [
        problem.add_variable(
            f"x{number:06d}", _finite(low), _finite(high), pulp.LpInteger if integer else pulp.LpContinuous
        )
        for number, (low, high, integer) in enumerate(zip(program.low, program.high, program.integer))
    ]
    problem += pulp.lpSum(cost * variable for cost, variable in zip(program.cost, variables))
    for low, high, terms in program.rows:
        total = pulp.lpSum(value * variables[number] for number, value in terms.items())
        if low == high:
            problem += total == low
            continue
        if low > -INFINITY:
            problem += total >= low
        if high < INFINITY:
            problem += total <= high
    return problem, variables


def _finite(value: float) -> float | None:
    return value if abs(value) < INFINITY else None


def _solve_highs(problem: Any, start: Sequence[float] | None, limits: Limits) -> Answer:
    told = _Told()
    solver = quiet_highs(
        {"threads": 1, "time_limit": _HANG_SECONDS, "mip_rel_gap": 1e-9, "mip_max_nodes": limits.nodes}
    )
    solver.callSolver = functools.partial(_run_highs, start=start, limits=limits, told=told)
    # PuLP 3.3 stumbles over a run that ends at the node limit; the answer has been read by then.
    with warnings.catch_warnings(), contextlib.suppress(KeyError):
        warnings.simplefilter("ignore")
        problem.solve(solver)
    assert told.answer is not None, "PuLP did not call the solver"
    return told.answer


def _run_highs(problem: Any, start: Sequence[float] | None, limits: Limits, told: _Told) -> None:
    """Run HiGHS from a start, and read its answer from itself: PuLP does not pass on its bound."""
    import highspy

    model = problem.solverModel
    if start is not None and len(start) == model.getNumCol():
        solution = highspy.HighsSolution()
        solution.col_value = list(start)
        model.setSolution(solution)
    for name in _WITHOUT_LOOKS:
        model.setOptionValue(name, False)  # HiGHS before 1.11 does not know them, and says so by its status alone
    until = limits.clock() + limits.seconds
    model.cbMipInterrupt.subscribe(functools.partial(_look, limits=limits, until=until, told=told))
    model.run()
    status, info = model.getModelStatus(), model.getInfo()
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = tuple(model.getSolution().col_value) if found else None
    bound = INFINITY if status == highspy.HighsModelStatus.kInfeasible else float(info.mip_dual_bound)
    late = told.late or status == highspy.HighsModelStatus.kTimeLimit
    optimal = found and status == highspy.HighsModelStatus.kOptimal
    told.answer = Answer(values, optimal, bound, "HiGHS", late, told.looks)


def _look(event: Any, limits: Limits, until: float, told: _Told) -> None:
    """HiGHS asks whether to go on."""
    told.looks += 1
    told.late = told.late or limits.clock() > until
    if told.late or told.looks > limits.looks:
        event.interrupt()


def _solve_other(
    problem: Any, variables: Sequence[Any], start: Sequence[float] | None, limits: Limits, name: str
) -> Answer:
    import pulp

    if start is not None:
        for variable, value in zip(variables, start):
            variable.setInitialValue(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = problem.solve(pulp.getSolver(name, msg=False, **_others_limits(name, limits, start is not None)))
    found, optimal = _ended(problem, result)
    values = tuple(float(variable.varValue or 0.0) for variable in variables) if found else None
    bound = float(pulp.value(problem.objective)) if optimal else -INFINITY
    return Answer(values, optimal, bound, name, not optimal)


def _others_limits(name: str, limits: Limits, warm: bool) -> dict[str, Any]:
    """Limits of a solver in a process of its own: nodes, and a time, which only CBC counts by the processor."""
    seconds = min(max(limits.looks_seconds, 0.01), limits.seconds, _HANG_SECONDS)
    if name == "SCIP_PY":
        return {"timeLimit": seconds, "warmStart": warm}
    if name == "SCIP_CMD":
        return {"timeLimit": seconds, "maxNodes": limits.nodes}
    return {"timeLimit": seconds, "maxNodes": limits.nodes, "timeMode": "cpu", "warmStart": warm}


def _ended(problem: Any, result: Any) -> tuple[bool, bool]:
    """Whether there is a solution, and whether it is optimal; without one, the values of variables are noise.

    In PuLP 3.3 a run cut short still has the status "optimal", and only ``sol_status`` tells; PuLP 4 returns both.
    """
    import pulp

    if hasattr(result, "has_solution"):
        return bool(result.has_solution), bool(result.has_solution) and int(result.status) == 1
    found = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    return found, problem.sol_status == pulp.LpSolutionOptimal
