"""A plan: micro-batches of groups of ranks, each with its documents, and how far from optimal it may be."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from seqpar.planner.strict import build, read_object, rows

FORMAT = 1
_WHAT = "plan"


@dataclass(frozen=True)
class PlannedGroup:
    """Ranks that share these documents (indices into the input) in one micro-batch, and what that is predicted to take.

    ``seconds`` is the sum of its three parts. ``tokens_per_device`` and ``memory_bytes`` are those of the fullest rank.
    """

    ranks: tuple[int, ...]
    degree: int
    transport: str
    documents: tuple[int, ...]
    tokens: int
    tokens_per_device: int
    memory_bytes: int
    compute_seconds: float
    communication_seconds: float
    fixed_seconds: float
    seconds: float


@dataclass(frozen=True)
class PlannedMicroBatch:
    """Groups that work side by side, as long as the slowest takes. Ranks in no group have nothing to do."""

    groups: tuple[PlannedGroup, ...]
    seconds: float


@dataclass(frozen=True)
class Baseline:
    """What another way of planning would take: groups of one degree only."""

    name: str
    degree: int
    transport: str
    num_micro_batches: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The plan of one global batch; every rank goes through all micro-batches in this order.

    Two plans of the same input and seed are equal, and so are their bytes, unless ``stopped_by`` says ``"deadline"``.
    The loss over the batch must be summed over tokens and divided by their global number, as groups differ in tokens.
    ``planning_seconds`` is what planning took; it is no part of the plan's identity, nor of its JSON.
    """

    model: str
    cluster: str
    devices: int
    capacity_tokens: int
    memory_budget_bytes: int
    num_documents: int
    num_tokens: int
    step_seconds: float
    lower_bound_seconds: float
    active_bound: str
    baselines: tuple[Baseline, ...]
    stage: str
    seed: int
    stopped_by: str
    note: str
    micro_batches: tuple[PlannedMicroBatch, ...]
    planning_seconds: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        """How much longer than the lower bound the step is, as a share of the bound; 0 is proven optimal."""
        return max(0.0, self.step_seconds / self.lower_bound_seconds - 1)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's bytes: what ranks compare before they use it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def groups_of(self, rank: int) -> tuple[PlannedGroup | None, ...]:
        """What this rank does in each micro-batch: its group, or None where it has nothing to do."""
        if not 0 <= rank < self.devices:
            raise ValueError(f"rank {rank} is not one of the {self.devices} of this plan")
        return tuple(
            next((group for group in batch.groups if rank in group.ranks), None) for batch in self.micro_batches
        )

    def to_json(self) -> str:
        """The plan as one line of JSON; the same plan gives the same bytes."""
        content = asdict(self)
        del content["planning_seconds"]
        micro_batches = content.pop("micro_batches")
        content = {"format": FORMAT, **content, "gap": self.gap, "micro_batches": micro_batches}
        return json.dumps(content, allow_nan=False)


def from_json(text: str) -> Plan:
    """The plan that ``to_json`` wrote; raises ``ValueError`` for anything else. It is not checked: see ``check``."""
    content = read_object(text, _WHAT, FORMAT)
    content.pop("gap", None)
    content["baselines"] = tuple(build(_WHAT, Baseline, row) for row in rows(_WHAT, content, "baselines"))
    content["micro_batches"] = tuple(_micro_batch(row) for row in rows(_WHAT, content, "micro_batches"))
    plan: Plan = build(_WHAT, Plan, content)
    return plan


def _micro_batch(row: Any) -> PlannedMicroBatch:
    groups = tuple(_group(group) for group in rows(_WHAT, row, "groups"))
    batch: PlannedMicroBatch = build(_WHAT, PlannedMicroBatch, {**row, "groups": groups})
    return batch


def _group(row: Any) -> PlannedGroup:
    lists = {key: tuple(rows(_WHAT, row, key)) for key in ("ranks", "documents")}
    for key, values in lists.items():
        if not all(type(value) is int for value in values):
            raise ValueError(f"plan: {key} of a group are whole numbers, got {list(values)!r:.60}")
    group: PlannedGroup = build(_WHAT, PlannedGroup, {**row, **lists})
    return group
