"""The adapter over PuLP: known optima, and nothing instead of noise where there is none."""

import itertools
import math
import random

import pytest

from seqpar.offload.planning import linear_program
from seqpar.offload.planning.linear_program import LinearProgram, solve, solver_name

pytest.importorskip("pulp")
pytest.importorskip("highspy")


def knapsack(values, sizes, room):
    program = LinearProgram()
    taken = [program.variable(-value, high=1.0) for value in values]
    program.at_most(dict(zip(taken, sizes)), room)
    return program


@pytest.mark.parametrize("seed", range(10))
def test_a_fractional_knapsack_is_filled_by_value_per_size(seed):
    draw = random.Random(seed)
    values = [draw.uniform(0.1, 2) for _ in range(6)]
    sizes = [draw.uniform(0.1, 2) for _ in range(6)]
    room = left = draw.uniform(0, sum(sizes))
    best = 0.0
    for value, size in sorted(zip(values, sizes), key=lambda pair: -pair[0] / pair[1]):
        part = min(1.0, left / size)
        best, left = best + part * value, left - part * size
    found = solve(knapsack(values, sizes, room))
    assert sum(value * part for value, part in zip(values, found)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_two_variables_are_best_at_a_corner(seed):
    """All corners of the rows by hand, the best feasible of them."""
    draw = random.Random(seed)
    rows = [(draw.uniform(-1, 2), draw.uniform(-1, 2), draw.uniform(0.5, 2)) for _ in range(4)]
    rows += [(1.0, 0.0, 3.0), (0.0, 1.0, 3.0), (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)]
    cost = (draw.uniform(-1, 1), draw.uniform(-1, 1))
    best = math.inf
    for (a, b, c), (d, e, f) in itertools.combinations(rows, 2):
        determinant = a * e - b * d
        if abs(determinant) > 1e-9:
            x, y = (c * e - b * f) / determinant, (a * f - c * d) / determinant
            if all(p * x + q * y <= r + 1e-9 for p, q, r in rows):
                best = min(best, cost[0] * x + cost[1] * y)
    program = LinearProgram()
    one, two = (program.variable(price, high=3.0) for price in cost)
    for a, b, c in rows[:4]:
        program.at_most({one: a, two: b}, c)
    x, y = solve(program)
    assert cost[0] * x + cost[1] * y == pytest.approx(best, abs=1e-9)


def test_equalities_and_lower_bounds_hold():
    program = LinearProgram()
    one, two = program.variable(1.0, low=0.25), program.variable(3.0)
    program.equals({one: 1.0, two: 1.0}, 2.0)
    program.at_most({one: 1.0}, 1.5)
    assert solve(program) == pytest.approx((1.5, 0.5), abs=1e-12)


def test_an_infinite_limit_is_no_row():
    program = knapsack([1.0], [1.0], math.inf)
    assert program.rows == [] and solve(program) == (1.0,)


def test_rows_that_contradict_give_no_values():
    program = knapsack([1.0], [1.0], 0.5)
    program.equals({0: 1.0}, 0.75)
    assert solve(program) is None


def test_a_cost_without_a_bound_gives_no_values():
    program = LinearProgram()
    program.variable(-1.0)
    assert solve(program) is None


def test_the_same_program_gives_the_same_values():
    program = knapsack([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1.7)
    assert len({solve(program) for _ in range(5)}) == 1


@pytest.mark.parametrize(("missing", "name"), [((), "HiGHS"), (("pulp",), None), (("pulp", "highspy"), None)])
def test_the_solver_is_what_is_installed(missing, name, monkeypatch):
    find_spec = linear_program.importlib.util.find_spec
    monkeypatch.setattr(
        linear_program.importlib.util, "find_spec", lambda module: None if module in missing else find_spec(module)
    )
    assert solver_name() == name
    if name is None:
        with pytest.raises(ValueError, match="needs PuLP and highspy: pip install"):
            solve(LinearProgram([1.0], [(0.0, 1.0)]))
