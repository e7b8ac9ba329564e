"""Plans of any shape, written down by hand or drawn at random: no solver chose them."""

import random

from seqpar.crossing.attention import TRANSPORTS
from seqpar.planner import Plan, PlannedGroup, PlannedMicroBatch


def planned_group(lengths, ranks, documents, transport="ring"):
    """Ranks that share documents; nobody predicts how long they take."""
    tokens = sum(lengths[document] for document in documents)
    return PlannedGroup(
        ranks=tuple(ranks),
        degree=len(ranks),
        transport=transport if len(ranks) > 1 else "none",
        documents=tuple(documents),
        tokens=tokens,
        tokens_per_device=-(-tokens // len(ranks)),
        memory_bytes=0,
        compute_seconds=0.0,
        communication_seconds=0.0,
        fixed_seconds=0.0,
        seconds=0.0,
    )


def plan_of(lengths, devices, micro_batches):
    """The plan of micro-batches of ``(ranks, documents)`` or ``(ranks, documents, transport)``."""
    batches = [
        PlannedMicroBatch(tuple(planned_group(lengths, *group) for group in groups), 0.0) for groups in micro_batches
    ]
    return Plan(
        model="any",
        cluster="any",
        devices=devices,
        capacity_tokens=sum(lengths),
        memory_budget_bytes=0,
        num_documents=len(lengths),
        num_tokens=sum(lengths),
        step_seconds=1.0,
        lower_bound_seconds=1.0,
        active_bound="none",
        baselines=(),
        stage="by hand",
        seed=0,
        stopped_by="work",
        note="",
        micro_batches=tuple(batches),
    )


def any_plan(lengths, devices, seed):
    """Documents dealt at random to random groups: any ranks in any order, some of them idle in a micro-batch."""
    rng = random.Random(seed)
    documents = rng.sample(range(len(lengths)), len(lengths))
    micro_batches = []
    while documents:
        ranks = rng.sample(range(devices), rng.randint(1, devices))
        groups = []
        while ranks and documents:
            degree, count = rng.randint(1, len(ranks)), rng.randint(1, len(documents))
            transport = rng.choice(TRANSPORTS)
            groups.append((ranks[:degree], documents[:count], transport))
            ranks, documents = ranks[degree:], documents[count:]
        micro_batches.append(groups)
    return plan_of(lengths, devices, micro_batches)
