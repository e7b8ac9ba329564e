"""Every way to change a plan in one place, and every way to damage its JSON: for tests of what must be noticed."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from seqpar.planner import Baseline, Plan, PlannedGroup, PlannedMicroBatch

Path = tuple[str | int, ...]
ROWS = (Plan, PlannedMicroBatch, PlannedGroup, Baseline)


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, str):
        return value + "?"
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 1.0
    assert isinstance(value, tuple), value
    return (*value, other(value[-1]) if value and isinstance(value[-1], int) else value[-1]) if value else (0,)


def changed_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan with one field changed, for every field of itself, its first micro-batch, a group and a baseline."""
    for name in names(Plan):
        yield f"Plan.{name}", replace(plan, **{name: other(getattr(plan, name))})
    batch = plan.micro_batches[0]
    for name in names(PlannedMicroBatch):
        yield f"PlannedMicroBatch.{name}", with_batch(plan, replace(batch, **{name: other(getattr(batch, name))}))
    group = batch.groups[0]
    for name in names(PlannedGroup):
        after = replace(group, **{name: other(getattr(group, name))})
        yield f"PlannedGroup.{name}", with_batch(plan, replace(batch, groups=(after, *batch.groups[1:])))
    row = plan.baselines[0]
    for name in names(Baseline):
        after_row = replace(row, **{name: other(getattr(row, name))})
        yield f"Baseline.{name}", replace(plan, baselines=(after_row, *plan.baselines[1:]))


def field_names() -> list[str]:
    """The names that ``changed_plans`` gives, without a plan."""
    return [f"{row.__name__}.{name}" for row in ROWS for name in names(row)]


def names(row: Any) -> list[str]:
    return [field.name for field in fields(row)]


def with_batch(plan: Plan, first: PlannedMicroBatch) -> Plan:
    return replace(plan, micro_batches=(first, *plan.micro_batches[1:]))


def places(content: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every place in JSON content below the top, with what is there; of a list its first entry only."""
    if path:
        yield path, content
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))
    if isinstance(content, list) and content:
        yield from places(content[0], (*path, 0))


def at(content: Any, path: Path) -> Any:
    for key in path:
        content = content[key]
    return content


def unlike(value: Any) -> list[Any]:
    """Values that cannot stand where this one stands: of other types, and nested nonsense."""
    others: list[Any] = [None, True, False, {"a": [1, {"b": None}]}, [[[]]], [None]]
    if not isinstance(value, str):
        others += ["", "1", "nan"]
    if not isinstance(value, (int, float)):
        others += [0, 1, -1.5]
    if isinstance(value, int):
        others += [0.5, 1.0]
    return others
