"""Planning in stages: static plans to fall back on, the heuristic, the bound, the exact program where it pays."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from seqpar.planner.assemble import micro_batches, placeable
from seqpar.planner.bounds.bounds import Bound, closed_form, relaxable, shortest_with, whole_step
from seqpar.planner.bounds.fluid import Relaxed, classes, relaxed_step
from seqpar.planner.bounds.lp import lp_available
from seqpar.planner.check import check
from seqpar.planner.exact.milp import Outcome, size, solve_exactly
from seqpar.planner.exact.solver import Limits, solver_name
from seqpar.planner.exact.subsets import solve_subsets
from seqpar.planner.plan import Baseline, Plan
from seqpar.planner.problem.costs import Table, table
from seqpar.planner.problem.explain import InfeasibleError, require_feasible
from seqpar.planner.problem.problem import Problem
from seqpar.planner.search.batching import area, fewest_micro_batches
from seqpar.planner.search.heuristic import Budgets, Candidate, heuristic
from seqpar.planner.search.schedule import Schedule, busy, schedule
from seqpar.planner.search.static import StaticPlan, best_plan, context_plan, static_plans
from seqpar.planner.work import Share, Work, guard_seconds, looks, packings, relaxations, subset_programs

OPTIMAL = 1e-6  # a gap below this is none: it is within what solvers call optimal
_SHARES = {"pack": 0.15, "squeeze": 0.3, "shake": 0.1, "bound": 0.25}  # of the seconds, by stage
_SURE = 20  # packings, whatever the seconds buy and the guard says; fewer of those that take long
_SURE_SECONDS = 8.0
_SURE_OF_LONG = 8
_CLIMBS_PER_SECOND = 60
_SMALL = 16  # documents
_TIGHT = (24, 0.85)  # documents, where more than this share of the memory is full
_MOST_VARIABLES = 6000
_COUNTS = 8  # numbers of micro-batches that are ruled out one by one
_FEW_RELAXATIONS = 12  # where the exact program will have the rest of the time
_NODES_PER_SECOND = 20_000
_EXACT_SHARE = 0.4  # of the seconds, for the exact program


@dataclass(frozen=True)
class Options:
    """How much planning may do, the seed of what is random in it, and whether the exact program may be used.

    ``seconds`` buy units of work, at the speed of a slow core that is free: what is done is the same on every machine,
    and takes longer on a busy one.
    """

    seconds: float = 1.0
    seed: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"planning takes some time: expected seconds above 0, got {self.seconds}")
        if self.seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {self.seed}")


def plan_batch(problem: Problem, options: Options = Options(), clock: Callable[[], float] = time.thread_time) -> Plan:
    """The best plan found with the given work, checked; raises :class:`InfeasibleError`, with the reasons, if there is
    none.

    The work of each stage is counted in units that the seconds buy, so the same problem, seed and seconds give the same
    bytes on every machine, however busy. Behind them is a guard over the processor's time, as ``clock`` counts it; only
    where that has to step in bytes may differ: ``stopped_by`` is then ``"deadline"``, and the ``note`` says how much
    was done. Never slower than the best static plan.
    """
    started = time.monotonic()
    require_feasible(problem)
    work = Work(guard_seconds(options.seconds), clock)
    rows = table(problem)
    statics = static_plans(problem, rows)
    relaxed: list[Relaxed] = []
    candidates = _candidates(problem, rows, statics, work, options, relaxed)
    if not candidates:
        raise InfeasibleError(
            ("no plan was found: groups of these degrees do not go side by side, or leave ranks without a token",)
        )
    best = candidates[0]
    bound = whole_step(rows, best.seconds, _bound_share(rows, best, work, options), relaxed)
    best, bound, note = _exactly(problem, rows, best, bound, work, options)
    note = "; ".join(filter(None, (note, work.note)))
    planned = _plan(problem, rows, best, bound, statics, options, note, "deadline" if work.late else "work")
    check(problem, planned)
    return replace(planned, planning_seconds=time.monotonic() - started)


def static_plan(problem: Problem, options: Options = Options(), note: str = "", degree: int | None = None) -> Plan:
    """The best plan with groups of one degree only, checked, in a moment: what to fall back on, and to compare with.

    ``degree``: this one; the best of all, if not given. Raises :class:`InfeasibleError` if there is none.
    """
    started = time.monotonic()
    require_feasible(problem)
    rows = table(problem)
    statics = static_plans(problem, rows)
    wanted = [static for static in statics if degree in (None, int(rows.degrees[static.kind]))]
    candidates = _placed(problem, rows, _named(rows, wanted))
    if not candidates:
        which = "one degree" if degree is None else f"degree {degree}"
        raise InfeasibleError((f"no plan with groups of {which} only: a document or the groups have no place",))
    best, bound = candidates[0], closed_form(rows)
    planned = _plan(problem, rows, best, bound, wanted, options, note, "work")
    check(problem, planned)
    return replace(planned, planning_seconds=time.monotonic() - started)


def _candidates(
    problem: Problem, rows: Table, statics: Sequence[StaticPlan], work: Work, options: Options, relaxed: list[Relaxed]
) -> list[Candidate]:
    """Schedules that have a place on the cluster, from short to long; ``relaxed`` takes what bounds them."""

    spend, documents = _relaxations(rows, work, options), classes(rows)
    shortest = min((static.schedule.step_seconds for static in statics), default=np.inf)

    def relax(count: int, seconds: float) -> tuple[float, ...]:
        best = min(seconds, shortest)
        if not relaxable(rows) or area(rows, count) >= best or not spend():
            return ()
        relaxed.append(relaxed_step(rows, documents, count, best))
        return relaxed[-1].lasting if relaxed[-1].seconds < best else ()

    found = heuristic(rows, _budgets(rows, work, options), options.seed, relax)
    return _placed(problem, rows, [*found, *_named(rows, statics)])


def _named(rows: Table, statics: Sequence[StaticPlan]) -> list[Candidate]:
    return [Candidate(static.schedule, f"static degree {int(rows.degrees[static.kind])}") for static in statics]


def _placed(problem: Problem, rows: Table, found: Sequence[Candidate]) -> list[Candidate]:
    """Those that have a place on the cluster and leave no rank without a token, from short to long."""
    mended = [Candidate(_mended(rows, candidate.schedule), candidate.stage) for candidate in found]
    mended.sort(key=lambda candidate: candidate.seconds)
    return [found for found in mended if busy(rows, found.schedule) and placeable(problem, found.schedule)]


def _budgets(rows: Table, work: Work, options: Options) -> Budgets:
    individual = int((rows.tokens > rows.capacity / 6).sum())
    groups = rows.devices * fewest_micro_batches(rows)
    shares = {name: packings(options.seconds * share, individual, groups) for name, share in _SHARES.items()}
    sure = min(_SURE, max(_SURE_OF_LONG, packings(_SURE_SECONDS, individual, groups)))
    climbs = int(options.seconds * _CLIMBS_PER_SECOND * 256 / max(256, rows.num_documents * rows.devices / 64))
    return Budgets(
        pack=work.take(max(sure, shares["pack"]), "packings", 0.5, sure),
        squeeze=work.take(shares["squeeze"], "packings to squeeze", 0.3),
        shake=work.take(shares["shake"], "packings to shake", 0.2),
        climb=work.take(climbs, "compositions", 0.15),
    )


def _relaxations(rows: Table, work: Work, options: Options) -> Share:
    """Relaxations of a step, each as large as eight of one micro-batch."""
    return work.take(max(1, relaxations(options.seconds * 0.3, len(rows.degrees), 8)), "relaxations", 0.5)


def _bound_share(rows: Table, best: Candidate, work: Work, options: Options) -> Share:
    if options.exact and solver_name() is not None and _few(rows):
        return work.take(_FEW_RELAXATIONS, "relaxations for the bound")
    most = relaxations(options.seconds * _SHARES["bound"], len(rows.degrees), len(best.schedule.seconds))
    return work.take(max(6, most), "relaxations for the bound", 0.1)


def _mended(rows: Table, found: Schedule) -> Schedule:
    """No rank without a token: groups with fewer tokens than ranks get a kind of group that is small enough."""

    def mended(kind: int, members: Sequence[int]) -> int:
        tokens = int(rows.tokens[list(members)].sum())
        if tokens >= rows.degrees[kind]:
            return kind
        seconds = rows.fixed + rows.seconds[list(members)].sum(axis=0)
        return int(np.where(rows.degrees <= tokens, seconds, np.inf).argmin())

    return schedule(rows, [[(mended(*group), group[1]) for group in groups] for groups in found.micro_batches])


def _exactly(
    problem: Problem, rows: Table, best: Candidate, bound: Bound, work: Work, options: Options
) -> tuple[Candidate, Bound, str]:
    """The exact program where the gap is open and the problem small, or its memory tight; the better of both."""
    if best.seconds <= bound.seconds * (1 + OPTIMAL):
        return best, Bound(best.seconds, f"proven optimal, {bound.reason}"), ""
    programs = subset_programs(0.8 * options.seconds, rows.num_documents) if options.exact else 0
    if programs:
        outcome = solve_subsets(rows, best.seconds, work.take(programs, "programs over subsets"))
        best, bound = _better(problem, rows, best, bound, outcome)
    if best.seconds <= bound.seconds * (1 + OPTIMAL):
        return best, bound, ""
    if not options.exact or solver_name() is None or not _few(rows):
        return best, bound, _note()
    count = _most_micro_batches(rows, best)
    variables = size(rows, count)
    if variables > _MOST_VARIABLES:
        return best, bound, _note()
    seconds = _EXACT_SHARE * options.seconds
    most = max(1, looks(seconds, variables))
    limits = Limits(int(_NODES_PER_SECOND * options.seconds), most, seconds, work.seconds_left, work.clock)
    outcome = solve_exactly(rows, best.schedule, count, limits)
    if outcome.out_of_time:
        work.stopped.append(f"{outcome.looks:,} of {most:,} looks at the exact program")
    return *_better(problem, rows, best, bound, outcome), ""


def _better(problem: Problem, rows: Table, best: Candidate, bound: Bound, outcome: Outcome) -> tuple[Candidate, Bound]:
    name = f"exact program ({outcome.solver})"
    if outcome.schedule is not None:
        found = Candidate(outcome.schedule, name)
        if found.seconds < best.seconds * (1 - 1e-9) and placeable(problem, found.schedule):
            best = found
    if outcome.optimal and best.seconds <= outcome.bound * (1 + OPTIMAL):
        return best, Bound(best.seconds, f"proven optimal by the {name}")
    if outcome.bound > bound.seconds:
        bound = Bound(min(outcome.bound, best.seconds), f"limited by what the {name} has proven so far")
    return best, bound


def _most_micro_batches(rows: Table, best: Candidate) -> int:
    """More micro-batches than this cannot be shorter than the best schedule."""
    fewest = fewest_micro_batches(rows)
    counts = [count for count in range(fewest, fewest + _COUNTS) if area(rows, count) < best.seconds]
    if area(rows, fewest + _COUNTS) < best.seconds:
        return rows.num_documents
    if lp_available():
        counts = [count for count in counts if shortest_with(rows, count, best.seconds) < best.seconds]
    return max(*counts, len(best.schedule.seconds), fewest)


def _few(rows: Table) -> bool:
    """Whether there are few enough documents to be exact, which is worth more where memory is tight."""
    fullness = int(rows.tokens.sum()) / (rows.devices * rows.capacity * fewest_micro_batches(rows))
    return rows.num_documents <= (_TIGHT[0] if fullness > _TIGHT[1] else _SMALL)


def _note() -> str:
    """What is missing where the gap is left open."""
    missing = []
    if solver_name() is None:
        missing.append("no MILP solver (PuLP with HiGHS, CBC or SCIP) is installed, which could prove more")
    if not lp_available():
        missing.append("highspy is not installed: the bound is the closed form")
    return "; ".join(missing)


def _plan(
    problem: Problem, rows: Table, best: Candidate, bound: Bound, statics: Sequence[StaticPlan],
    options: Options, note: str, stopped_by: str,
) -> Plan:  # fmt: skip
    batches = micro_batches(problem, rows, best.schedule)
    step_seconds = sum(batch.seconds for batch in batches)
    proven = best.seconds <= bound.seconds * (1 + OPTIMAL)
    return Plan(
        model=problem.costs.name,
        cluster=problem.cluster.name,
        devices=problem.cluster.devices,
        capacity_tokens=problem.capacity,
        memory_budget_bytes=problem.cluster.memory_bytes,
        num_documents=len(problem.lengths),
        num_tokens=sum(problem.lengths),
        step_seconds=step_seconds,
        lower_bound_seconds=step_seconds if proven else min(bound.seconds, step_seconds),
        active_bound=bound.reason,
        baselines=_baselines(problem, tuple(static for static in statics if busy(rows, static.schedule))),
        stage=best.stage,
        seed=options.seed,
        stopped_by=stopped_by,
        note=note,
        micro_batches=batches,
    )


def _baselines(problem: Problem, statics: tuple[StaticPlan, ...]) -> tuple[Baseline, ...]:
    if not statics:
        return ()
    named = [("static", context_plan(problem, statics)), ("best_static", best_plan(statics))]
    named.extend(("degree", static) for static in statics)
    return tuple(_baseline(problem, name, static) for name, static in named)


def _baseline(problem: Problem, name: str, static: StaticPlan) -> Baseline:
    kind, found = problem.costs.kinds[static.kind], static.schedule
    return Baseline(name, kind.degree, kind.transport, len(found.seconds), found.step_seconds)
