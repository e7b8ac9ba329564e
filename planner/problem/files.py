"""A cost model and its cluster as JSON: what ``seqpar calibrate`` writes and ``seqpar plan`` reads."""

import json
from dataclasses import fields
from typing import Any

from seqpar.planner.problem.problem import Cluster, CostModel, GroupKind
from seqpar.planner.problem.texts import read_text
from seqpar.planner.strict import build, read_object, rows

FORMAT = 1
_WHAT = "cost model"


def costs_to_json(costs: CostModel, cluster: Cluster) -> str:
    """Both as JSON, a line for each value; the same values give the same bytes, and ``costs_from_json`` gives them."""
    content = {
        "format": FORMAT,
        "cluster": _plain(cluster),
        "costs": {**_plain(costs), "kinds": [_plain(kind) for kind in costs.kinds]},
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def costs_from_json(text: str) -> tuple[CostModel, Cluster]:
    """What ``costs_to_json`` wrote; raises ``ValueError`` that names the field for anything else."""
    content = read_object(text, _WHAT, FORMAT)
    if set(content) != {"cluster", "costs"}:
        odd = sorted(set(content) ^ {"cluster", "costs"})
        raise ValueError(f"this is not a {_WHAT}: expected format, cluster and costs; missing or unknown: {odd!r:.80}")
    cluster: Cluster = build(_WHAT, Cluster, content["cluster"])
    kinds = tuple(build(_WHAT, GroupKind, row) for row in rows(_WHAT, content["costs"], "kinds"))
    costs: CostModel = build(_WHAT, CostModel, {**content["costs"], "kinds": kinds})
    return costs, cluster


def read_costs(path: str) -> tuple[CostModel, Cluster]:
    """The cost model and cluster in a file; raises ``ValueError`` with one line if it cannot be read or is no such."""
    text = read_text(path, path, f"a {_WHAT} as JSON")
    try:
        return costs_from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _plain(value: Any) -> dict[str, Any]:
    """The fields that are no tuples, each of its own type: equal values, whole or not, give equal bytes."""
    found: dict[str, Any] = {}
    for part in fields(value):
        entry = getattr(value, part.name)
        type_: Any = part.type
        if type_ in (int, float, str):
            found[part.name] = type_(entry) + type_()
            if found[part.name] != entry:
                raise ValueError(f"{_WHAT}: {part.name} of {type(value).__name__} cannot be {entry!r:.60}")
    return found
