"""Why a problem has no plan: which document does not fit, and what the capacity is."""

from dataclasses import dataclass

from seqpar.planner.problem.problem import Problem

_GIB = 2**30


class InfeasibleError(ValueError):
    """No plan exists; the message says why in one line, ``reasons`` holds a line for each cause."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        self.reasons = reasons
        more = f" (and {len(reasons) - 1} more: see --why)" if len(reasons) > 1 else ""
        super().__init__(reasons[0] + more)


@dataclass(frozen=True)
class Limit:
    """The largest group on offer, and the tokens it holds."""

    degree: int
    tokens: int


def largest(problem: Problem) -> Limit:
    """What the largest group holds."""
    degree = max(kind.degree for kind in problem.costs.kinds)
    return Limit(degree, degree * problem.capacity)


def reasons(problem: Problem) -> tuple[str, ...]:
    """A line for each cause that no plan exists; empty if there is one."""
    cluster, costs = problem.cluster, problem.costs
    if problem.capacity < 1:
        taken, memory = problem.reserved_bytes / _GIB, cluster.memory_bytes / _GIB
        return (f"no token fits on a device of {cluster.name}: model state and communicators of {costs.name} take "
                f"{taken:.1f} of {memory:.1f} GiB, and a token {costs.bytes_per_token / 2**20:.2f} MiB; use more "
                "devices or memory",)  # fmt: skip
    limit = largest(problem)
    found = [_too_long(problem, index, limit) for index, length in enumerate(problem.lengths) if length > limit.tokens]
    smallest = min(kind.degree for kind in costs.kinds)
    if sum(problem.lengths) < smallest:
        found.append(f"{sum(problem.lengths)} tokens leave ranks of a group of {smallest} without any; offer degree 1")
    return tuple(found)


def _too_long(problem: Problem, index: int, limit: Limit) -> str:
    """No word of how many devices there should be: more of them share the state, and each of them holds more."""
    length = problem.lengths[index]
    memory, held = problem.cluster.memory_bytes / _GIB, f"{problem.capacity:,} tokens"
    return (f"document {index} has {length:,} tokens: one device holds {held} in {memory:.1f} GiB, and the largest "
            f"group of {limit.degree} holds {limit.tokens:,}")  # fmt: skip


def require_feasible(problem: Problem) -> None:
    """Raise :class:`InfeasibleError` if no plan exists."""
    found = reasons(problem)
    if found:
        raise InfeasibleError(found)
