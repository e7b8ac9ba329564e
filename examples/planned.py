"""Training by plans: for every batch, who shares which document is planned ahead, from costs that are measured here.

Every batch is also run by plans of one degree, each plan in its turn first and last, so that one run shows all times.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from corpus import Corpus, Document, read
from optimizer import ExactAdamW
from options import DTYPES, Options
from planned_report import Curves, PlannedReport, PlannedStep
from torch import Tensor

from seqpar import plan_ahead, run_plan, sequence_parallel
from seqpar.collectives import Group, Ledger
from seqpar.estimates.calibrate import Calibration, calibrate
from seqpar.models import build
from seqpar.planner import Options as Planning
from seqpar.planner import Plan, Problem, problem_of, static_plan
from seqpar.training.wrap import SequenceParallel

SHORTEST = 128


def train_planned(options: Options, corpus: Corpus, group: Group, device: torch.device, curves: Curves) -> list[float]:
    """Train, and return the loss of every step: the same numbers whatever the plans are."""
    report = PlannedReport(options, curves, speaks=group.rank == 0)
    group = Ledger(group)  # counts what this rank sends
    torch.manual_seed(options.seed)  # the same weights on every rank
    model = sequence_parallel(
        build(options.model).to(device, DTYPES[options.dtype]), group=group, layout=options.layout, scan=options.scan
    )
    measured = measure(options, model)
    report.measured(measured)
    optimizer = ExactAdamW(model, options.learning_rate, options.warm_up)
    plans = plan_ahead(
        batches(corpus, options.steps), sizes, group=group, costs=measured.costs, cluster=measured.cluster,
        options=Planning(seconds=options.plan_seconds), device=device,
    )  # fmt: skip
    losses = []
    for number, (documents, plan) in enumerate(plans):
        tokens, lengths = read(documents, device)
        problem = problem_of(lengths, measured.cluster, measured.costs)
        rivals = {"planned": plan, **one_degree(problem, longest(options))}
        loss, seconds, sent = run_all(model, group, rivals, tokens, lengths, first=number)
        optimizer.step()  # the gradients are those of one device, whichever plan came last
        losses.append(loss)
        report.step(PlannedStep(number + 1, loss, rivals, seconds, sent["planned"]))
    report.close()
    return losses


def longest(options: Options) -> int:
    """No document has more tokens."""
    return min(options.longest or options.tokens, options.tokens)


def measure(options: Options, model: SequenceParallel) -> Calibration:
    """What groups of every degree cost here, with as much memory as ``--device-tokens`` says."""
    most = longest(options)
    lengths = sorted({max(SHORTEST, most // share) for share in (1, 4, 16)} | {SHORTEST, 2 * SHORTEST})
    found = calibrate(model, model.group, lengths=lengths, repeats=2)
    if not options.device_tokens:
        return found
    memory = int(found.costs.state_bytes + options.device_tokens * found.costs.bytes_per_token) + 1
    return replace(found, cluster=replace(found.cluster, memory_bytes=memory))


def batches(corpus: Corpus, steps: int) -> Iterator[list[Document]]:
    """The documents of every step, without empty ones."""
    for number in range(steps):
        (sequence,) = corpus.step(number, 1)
        yield [document for document in sequence if document.size]


def sizes(documents: Sequence[Document]) -> list[int]:
    """Their lengths in tokens."""
    return [document.size for document in documents]


def one_degree(problem: Problem, most: int) -> dict[str, Plan]:
    """The plan of the degree that holds every document of the run, and that of the best degree for this batch."""
    enough = [kind.degree for kind in problem.costs.kinds if kind.degree * problem.capacity >= most]
    degree = min(enough, default=max(kind.degree for kind in problem.costs.kinds))
    return {"static": static_plan(problem, degree=degree), "best_static": static_plan(problem)}


def run_all(
    model: SequenceParallel, ledger: Ledger, plans: dict[str, Plan], tokens: Tensor, lengths: Sequence[int], first: int
) -> tuple[float, dict[str, float], dict[str, int]]:
    """The loss of a batch, the same by every plan, the seconds that each takes and the bytes that this rank sends;
    equal plans are run once."""
    distinct = {plan.micro_batches: plan for plan in plans.values()}
    turns = [*distinct.items()]
    turns = turns[first % len(turns) :] + turns[: first % len(turns)]
    seconds, sent = {}, {}
    for placement, plan in turns:
        model.zero_grad()
        model.group.all_reduce(torch.zeros(1, device=tokens.device)).wait()
        begin, before = time.perf_counter(), ledger.bytes_
        loss = run_plan(model, plan, tokens, labels=tokens, lengths=lengths).item()
        seconds[placement], sent[placement] = time.perf_counter() - begin, ledger.bytes_ - before
    placements = {name: plan.micro_batches for name, plan in plans.items()}
    return (
        loss,
        {name: seconds[placement] for name, placement in placements.items()},
        {name: sent[placement] for name, placement in placements.items()},
    )
