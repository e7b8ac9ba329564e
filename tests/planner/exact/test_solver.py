"""The solver adapter: limits, starts, programs without a solution, and what is done where a solver is missing."""

import importlib.util
import itertools
import random

import pytest

from seqpar.planner import Options, check, plan_batch
from seqpar.planner.bounds.lp import lp_available
from seqpar.planner.exact.solver import INFINITY, Answer, Limits, Program, _ended, solve, solver_name
from tests.planner.problems import published, small_problem

needs_highs = pytest.mark.skipif(solver_name() != "HiGHS", reason="HiGHS or PuLP is not installed")
SOLVERS = ["HiGHS", "PULP_CBC_CMD", "COIN_CMD", "SCIP_PY"]


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each solver that PuLP has here, in turn, as the one that ``solve`` uses."""
    pulp = pytest.importorskip("pulp")
    name: str = request.param
    if name not in pulp.listSolvers(onlyAvailable=True):
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr("seqpar.planner.exact.solver.solver_name", lambda: name)
    return name


def knapsack(seed: int, items: int = 9) -> tuple[Program, float]:
    """A small knapsack with two rows, and its best value by trying all subsets."""
    draw = random.Random(seed)
    program, values = Program(), [draw.randint(5, 40) for _ in range(items)]
    columns = [program.variable(-float(value), 0.0, 1.0, True) for value in values]
    weights = [[draw.randint(1, 20) for _ in range(items)] for _ in range(2)]
    limits = [sum(row) // 3 for row in weights]
    for row, limit in zip(weights, limits):
        program.row(-INFINITY, float(limit), {column: float(w) for column, w in zip(columns, row)})
    best = max(
        sum(value for value, taken in zip(values, choice) if taken)
        for choice in itertools.product((0, 1), repeat=items)
        if all(sum(w for w, taken in zip(row, choice) if taken) <= limit for row, limit in zip(weights, limits))
    )
    return program, -float(best)


def market_split(items: int = 34, rows: int = 5) -> Program:
    """Equal halves in several rows at once: relaxed at the root, and out of reach of branching."""
    draw, program = random.Random(7), Program()
    columns = [program.variable(1.0, 0.0, 1.0, True) for _ in range(items)]
    for _ in range(rows):
        weights = [float(draw.randint(1, 99)) for _ in columns]
        half = float(sum(weights) // 2)
        program.row(half, half, dict(zip(columns, weights)))
    return program


def value(program: Program, answer: Answer) -> float:
    """The cost of an answer, after a look at every row and bound."""
    assert answer.values is not None
    for low, high, terms in program.rows:
        total = sum(factor * answer.values[column] for column, factor in terms.items())
        assert low - 1e-5 <= total <= high + 1e-5
    for at, found in enumerate(answer.values):
        assert program.low[at] - 1e-6 <= found <= program.high[at] + 1e-6
        assert not program.integer[at] or abs(found - round(found)) < 1e-5
    return sum(cost * found for cost, found in zip(program.cost, answer.values))


@pytest.mark.newest
@pytest.mark.parametrize("seed", range(4))
def test_every_solver_finds_the_best_of_all(solver: str, seed: int) -> None:
    program, best = knapsack(seed)
    answer = solve(program, None, Limits(10_000))
    assert answer.optimal
    assert not answer.out_of_time
    assert value(program, answer) == pytest.approx(best)
    assert answer.bound == pytest.approx(best)
    assert answer.solver == solver


def test_every_solver_says_that_there_is_no_solution(solver: str) -> None:
    program, _ = knapsack(0)
    program.row(8.5, INFINITY, dict.fromkeys(range(9), 1.0))
    answer = solve(program, None, Limits(10_000))
    assert answer.values is None
    assert not answer.optimal


def test_every_solver_takes_integers_beyond_one_and_variables_without_a_limit(solver: str) -> None:
    program = Program()
    x, y = program.variable(1.0, 0.0, INFINITY, True), program.variable(0.5, 0.0, INFINITY, False)
    program.row(7.3, INFINITY, {x: 1.0, y: 1.0})
    program.row(-INFINITY, 4.5, {y: 1.0})
    answer = solve(program, None, Limits(1000))
    assert answer.values == pytest.approx((3.0, 4.3))


def test_no_variable_is_read_of_a_run_that_found_nothing_with_its_work(solver: str) -> None:
    program = market_split()
    answer = solve(program, None, Limits(200, looks=200, looks_seconds=0.3))
    assert not answer.optimal
    if answer.values is not None:
        value(program, answer)
    assert answer.out_of_time == (solver != "HiGHS"), "only HiGHS tells a guard from work that is done"
    assert answer.bound <= sum(program.cost)


@needs_highs
def test_highs_stops_at_the_same_look_whatever_the_clock_says() -> None:
    """And a clock that jumps ahead, as the processor's may not, ends it by the guard, which the answer says."""
    program = market_split()
    ticks = itertools.count(0.0, 1e3)
    slow, fast = (solve(program, None, Limits(10**9, 150, clock=clock)) for clock in (lambda: next(ticks), lambda: 0.0))
    assert slow == fast
    assert not slow.optimal and not slow.out_of_time
    assert slow.looks >= 150, "it stops at the next look"
    again = itertools.count(0.0, 1.0)
    guarded = solve(program, None, Limits(10**9, 150, seconds=40.0, clock=lambda: next(again)))
    assert guarded.out_of_time and not guarded.optimal
    assert 40 <= guarded.looks < slow.looks


def test_a_start_is_kept_or_bettered_when_the_time_ends_at_once(solver: str) -> None:
    program = market_split(rows=1)
    program.rows[0] = (program.rows[0][0] - 60, program.rows[0][1] + 60, program.rows[0][2])
    first = solve(program, None, Limits(100_000))
    assert first.values is not None
    again = solve(program, first.values, Limits(1))
    if again.values is not None:
        assert value(program, again) <= value(program, first) * (1 + 1e-6)


@needs_highs
def test_highs_ends_at_its_node_limit_with_the_start_and_a_bound_below_it() -> None:
    program = market_split(items=30, rows=3)
    slack = [program.variable(1000.0, 0.0, 5000.0, False) for _ in range(6)]
    for number, (_, _, terms) in enumerate(program.rows):
        terms.update({slack[2 * number]: 1.0, slack[2 * number + 1]: -1.0})
    start = [0.0] * 30 + [0.0] * 6
    for number, (low, _, _) in enumerate(program.rows):
        start[30 + 2 * number] = low
    worst = sum(cost * x for cost, x in zip(program.cost, start))
    answers = [solve(program, start, Limits(nodes)) for nodes in (0, 0, 20)]
    assert answers[0] == answers[1]
    for answer in answers:
        assert not answer.out_of_time
        assert not answer.optimal
        assert answer.bound <= value(program, answer) <= worst
    assert value(program, answers[2]) <= value(program, answers[0])
    assert answers[2].bound >= answers[0].bound


@needs_highs
def test_highs_takes_a_start_that_is_wrong_for_no_more_than_it_is() -> None:
    program, best = knapsack(3)
    for start in ([1.0] * 9, [0.5] * 9, [0.0] * 3):
        answer = solve(program, start, Limits(10_000))
        assert answer.optimal
        assert value(program, answer) == pytest.approx(best)


@needs_highs
def test_highs_without_a_solution_has_an_infinite_bound() -> None:
    program, _ = knapsack(1)
    program.row(8.5, INFINITY, dict.fromkeys(range(9), 1.0))
    assert solve(program, None, Limits(10_000)).bound == INFINITY


class _Result:
    """What a solve returns in PuLP 4."""

    def __init__(self, has_solution: bool, status: int) -> None:
        self.has_solution, self.status = has_solution, status


class _Problem:
    """What a problem says of its last solve in PuLP 3."""

    def __init__(self, sol_status: int) -> None:
        self.sol_status = sol_status


@pytest.mark.parametrize(
    ("problem", "result", "expected"),
    [
        (None, _Result(True, 1), (True, True)),
        (None, _Result(True, 0), (True, False)),
        (None, _Result(False, 1), (False, False)),
        (None, _Result(False, -1), (False, False)),
        (_Problem(1), 1, (True, True)),
        (_Problem(2), 1, (True, False)),
        (_Problem(0), 1, (False, False)),
        (_Problem(-1), -1, (False, False)),
    ],
)
def test_how_a_run_ended_is_read_from_the_solution_and_not_the_status(
    problem: object, result: object, expected: tuple[bool, bool]
) -> None:
    pytest.importorskip("pulp")
    assert _ended(problem, result) == expected


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    found = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return None if name in names else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_without_pulp_there_is_no_solver_and_solving_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "pulp")
    assert solver_name() is None
    with pytest.raises(ValueError, match=r"pip install 'seqpar\[planner\]'"):
        solve(Program(), None, Limits(1))


def test_without_highspy_another_solver_is_taken_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pulp = pytest.importorskip("pulp")
    hide(monkeypatch, "highspy")
    assert not lp_available()
    available = pulp.listSolvers(onlyAvailable=True)
    assert solver_name() in (set(available) & {*SOLVERS[1:], "SCIP_CMD"} or {None})
    monkeypatch.setattr(pulp, "listSolvers", lambda **_: [])
    assert solver_name() is None


@pytest.mark.parametrize(("missing", "words"), [
    (("pulp",), "no MILP solver"), (("highspy",), "the bound is the closed form"),
    (("pulp", "highspy"), "no MILP solver"),
])  # fmt: skip
def test_what_is_missing_is_noted_in_a_plan_that_holds_all_the_same(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], words: str
) -> None:
    hide(monkeypatch, *missing)
    monkeypatch.setattr("seqpar.planner.solve.subset_programs", lambda *_: 0)
    problem = published([100_000, 48_000, 48_000, 48_000, 48_000])
    plan = plan_batch(problem, Options(seconds=3.0))
    check(problem, plan)
    assert plan.step_seconds == pytest.approx(3.8589, abs=5e-5)
    if plan.gap > 0:
        assert words in plan.note
    if set(missing) == {"pulp", "highspy"}:
        assert plan.gap > 0
        assert "exact" not in plan.stage


def test_cbc_or_scip_alone_proves_small_plans(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seqpar.planner.solve.solver_name", lambda: solver)
    monkeypatch.setattr("seqpar.planner.solve.subset_programs", lambda *_: 0)
    problem = small_problem([74, 71, 69, 63, 45], devices=2, node=2, degrees=(1, 2))
    plan = plan_batch(problem, Options(seconds=5.0))
    check(problem, plan)
    assert plan.gap == 0
    assert solver in plan.stage
