"""An independent checker: recomputes all that a plan claims, from the problem alone, and refuses what does not hold.

It shares no code with the solver: the formulas stand here a second time, in plain Python, and so do the rules of
alignment. What it does not do is search.
"""

import math
from collections import Counter
from collections.abc import Iterator

from seqpar.planner.plan import Plan, PlannedGroup, PlannedMicroBatch
from seqpar.planner.problem.problem import Cluster, GroupKind, Problem

_CLOSE = 1e-6


class PlanRefusedError(ValueError):
    """A plan that must not be used; ``faults`` holds a line for each thing that is wrong."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        super().__init__(f"plan refused: {faults[0]}{more}")


def check(problem: Problem, plan: Plan) -> None:
    """Raise :class:`PlanRefusedError` unless the plan is one for this problem and all its figures are right."""
    found = faults(problem, plan)
    if found:
        raise PlanRefusedError(found)


def faults(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """A line for each thing that is wrong with a plan; empty if it may be used."""
    found = [*_identity(problem, plan), *_coverage(problem, plan), *_impossible(problem)]
    if found:
        return tuple(found)  # nothing below makes sense for another problem's plan
    for number, batch in enumerate(plan.micro_batches):
        found.extend(f"micro-batch {number}: {fault}" for fault in _micro_batch(problem, batch))
    found.extend(_totals(problem, plan))
    return tuple(found)


def _identity(problem: Problem, plan: Plan) -> Iterator[str]:
    expected = {
        "model": problem.costs.name,
        "cluster": problem.cluster.name,
        "devices": problem.cluster.devices,
        "memory_budget_bytes": problem.cluster.memory_bytes,
        "num_documents": len(problem.lengths),
        "num_tokens": sum(problem.lengths),
        "capacity_tokens": _capacity(problem),
    }
    for name, value in expected.items():
        if getattr(plan, name) != value:
            yield f"{name} is {getattr(plan, name)!r}, expected {value!r}"


def _impossible(problem: Problem) -> Iterator[str]:
    """Documents that no group holds: there is no plan for them, whatever it says."""
    most = _capacity(problem) * max(kind.degree for kind in problem.costs.kinds)
    for document, length in enumerate(problem.lengths):
        if length > most:
            yield f"document {document} has {length} tokens, and the largest group holds {most}"


def _coverage(problem: Problem, plan: Plan) -> Iterator[str]:
    times = [0] * len(problem.lengths)
    for batch in plan.micro_batches:
        for group in batch.groups:
            for document in group.documents:
                if not 0 <= document < len(times):
                    yield f"document {document} does not exist: there are {len(times)}"
                else:
                    times[document] += 1
    wrong = [document for document, count in enumerate(times) if count != 1]
    if wrong:
        yield f"document {wrong[0]} is placed {times[wrong[0]]} times, expected once ({len(wrong)} such documents)"


def _micro_batch(problem: Problem, batch: PlannedMicroBatch) -> Iterator[str]:
    if not batch.groups:
        yield "has no groups"
        return
    owner: dict[int, int] = {}
    for number, group in enumerate(batch.groups):
        yield from (f"group {number}: {fault}" for fault in _group(problem, group))
        for rank in group.ranks:
            if rank in owner:
                yield f"rank {rank} is in groups {owner[rank]} and {number} at once"
            owner[rank] = number
    slowest = max(group.seconds for group in batch.groups)
    if not _close(batch.seconds, slowest):
        yield f"takes {batch.seconds} s, but its slowest group takes {slowest} s"


def _group(problem: Problem, group: PlannedGroup) -> Iterator[str]:
    kind = _kind(problem, group)
    if kind is None:
        yield f"degree {group.degree} over {group.transport} is not on offer"
        return
    yield from _ranks(problem.cluster, group)
    lengths = [problem.lengths[document] for document in group.documents]
    tokens = sum(lengths)
    if not lengths or tokens < group.degree:
        yield f"{tokens} tokens leave some of its {group.degree} ranks without work"
    per_device = (tokens + group.degree - 1) // group.degree
    if (group.tokens, group.tokens_per_device) != (tokens, per_device):
        yield f"holds {tokens} tokens, {per_device} a device, not {group.tokens} and {group.tokens_per_device}"
    memory = _reserved(problem) + per_device * problem.costs.bytes_per_token
    if memory > problem.cluster.memory_bytes * (1 + 1e-12):
        yield f"takes {memory:,.0f} bytes a device of {problem.cluster.memory_bytes:,}"
    if abs(group.memory_bytes - memory) > 2:
        yield f"says {group.memory_bytes:,} bytes a device, but takes {memory:,.0f}"
    yield from _seconds(kind, lengths, group)


def _ranks(cluster: Cluster, group: PlannedGroup) -> Iterator[str]:
    ranks, node = group.ranks, cluster.devices_per_node
    if len(ranks) != group.degree or list(ranks) != list(range(ranks[0], ranks[0] + group.degree)):
        yield f"ranks {ranks[:4]}... are not {group.degree} ranks side by side"
        return
    first, last = ranks[0], ranks[-1]
    if first < 0 or last >= cluster.devices:
        yield f"ranks {first} to {last} are not all among the {cluster.devices} of the cluster"
    if group.degree <= node:
        if first // node != last // node:
            yield f"ranks {first} to {last} leave their node of {node}"
        step = math.gcd(group.degree, node)
        aligned = first % node % step == 0
    else:
        step = node * math.gcd(group.degree // node, cluster.devices // node)
        aligned = first % step == 0 and group.degree % node == 0
    if not aligned:
        yield f"starts at rank {first}, but groups of {group.degree} are aligned to {step}"


def _seconds(kind: GroupKind, lengths: list[int], group: PlannedGroup) -> Iterator[str]:
    squares, total = sum(length * length for length in lengths), sum(lengths)
    compute = kind.quadratic_seconds * squares + kind.linear_seconds * total
    shown = 0.0
    for length in lengths:
        message = kind.message_seconds * length - kind.hidden_seconds * length * length
        shown += message if message > 0 else 0.0
    fixed = kind.fixed_seconds + kind.latency_seconds
    rows = (("compute", group.compute_seconds, compute), ("communication", group.communication_seconds, shown),
            ("fixed", group.fixed_seconds, fixed), ("all", group.seconds, compute + shown + fixed))  # fmt: skip
    for name, claimed, value in rows:
        if not _close(claimed, value):
            yield f"says {claimed} s of {name}, but takes {value} s"


def _totals(problem: Problem, plan: Plan) -> Iterator[str]:
    step = sum(batch.seconds for batch in plan.micro_batches)
    if not _close(plan.step_seconds, step):
        yield f"step_seconds is {plan.step_seconds}, but the micro-batches take {step}"
    if not 0 < plan.lower_bound_seconds <= plan.step_seconds * (1 + _CLOSE):
        yield f"lower_bound_seconds is {plan.lower_bound_seconds}, which is not between 0 and the step"
    least = _least_seconds(problem)
    if plan.lower_bound_seconds < least * (1 - _CLOSE):
        yield f"lower_bound_seconds is {plan.lower_bound_seconds}, but {least} is easy to see"
    yield from _baselines(problem, plan)


def _baselines(problem: Problem, plan: Plan) -> Iterator[str]:
    offered = {(kind.degree, kind.transport) for kind in problem.costs.kinds}
    for baseline in plan.baselines:
        known = (baseline.degree, baseline.transport) in offered and baseline.num_micro_batches > 0
        if not (known and math.isfinite(baseline.seconds)):
            yield f"baseline {baseline.name} of degree {baseline.degree} over {baseline.transport} cannot be"
        if baseline.seconds < plan.step_seconds * (1 - _CLOSE):
            yield f"is slower than its own baseline {baseline.name} of degree {baseline.degree}"
        if baseline.seconds < plan.lower_bound_seconds * (1 - _CLOSE):
            yield f"baseline {baseline.name} of degree {baseline.degree} is below the lower bound"


def _least_seconds(problem: Problem) -> float:
    """What no plan can beat: the longest document alone, or all devices at work all the time; and the fixed costs."""
    capacity, devices = _capacity(problem), problem.cluster.devices
    batches = math.ceil(sum(problem.lengths) / (capacity * devices))
    least_fixed = min(kind.fixed_seconds + kind.latency_seconds for kind in problem.costs.kinds)
    area, longest = 0.0, 0.0
    for length, times in Counter(problem.lengths).items():
        kinds = [kind for kind in problem.costs.kinds if length <= kind.degree * capacity]
        area += times * min(kind.degree * _alone(kind, length) for kind in kinds)
        fastest = min(kind.fixed_seconds + kind.latency_seconds + _alone(kind, length) for kind in kinds)
        longest = max(longest, fastest)
    return max(batches * least_fixed + area / devices, longest + (batches - 1) * least_fixed)


def _alone(kind: GroupKind, length: int) -> float:
    message = kind.message_seconds * length - kind.hidden_seconds * length * length
    return kind.quadratic_seconds * length * length + kind.linear_seconds * length + max(message, 0.0)


def _kind(problem: Problem, group: PlannedGroup) -> GroupKind | None:
    for kind in problem.costs.kinds:
        if kind.degree == group.degree and kind.transport == group.transport:
            return kind
    return None


def _reserved(problem: Problem) -> float:
    """Model state, and a communicator for each group that one rank can ever be in."""
    node, devices = problem.cluster.devices_per_node, problem.cluster.devices
    groups = 0
    for degree in {kind.degree for kind in problem.costs.kinds} - {1}:
        step = math.gcd(degree, node) if degree <= node else node * math.gcd(degree // node, devices // node)
        groups += degree // step
    return problem.costs.state_bytes + groups * problem.cluster.communicator_bytes


def _capacity(problem: Problem) -> int:
    left = problem.cluster.memory_bytes - _reserved(problem)
    return max(0, int(left // problem.costs.bytes_per_token))


def _close(claimed: float, value: float) -> bool:
    return abs(claimed - value) <= _CLOSE * max(abs(value), 1e-12)
