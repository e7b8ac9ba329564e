"""The plan of every batch, made ahead by one rank's planning process, and the same on every rank."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TypeVar

import torch

from seqpar.collectives import Group, Ranks, group_of
from seqpar.collectives.group import where
from seqpar.planner import Ahead, Cluster, CostModel, Options, Plan, check, problem_of
from seqpar.planner.serve import planned, refusal
from seqpar.sharding.agreement import check_same, text_fingerprint

T = TypeVar("T")


def plan_ahead(
    batches: Iterable[T],
    lengths: Callable[[T], Sequence[int]],
    *,
    group: Ranks,
    costs: CostModel,
    cluster: Cluster,
    options: Options | None = None,
    depth: int = 2,
    timeout_seconds: float = 10.0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[T, Plan]]:
    """Every batch with its plan, while those of the next ``depth`` batches are being made in another process.

    Law: every rank gets the same plan, checked against the lengths it has itself. Rank 0's process plans; the other
    ranks get the plan as one message.

    ``batches``: the same on every rank; ``lengths(batch)`` its document lengths in tokens. ``cluster``: one device a
    rank of ``group``; ``costs``: what groups cost, as from ``seqpar calibrate``. ``options.seconds``: the work of
    planning a batch; ``timeout_seconds``: the most that a step waits for its plan once the process has started, and a
    plan that is later is replaced by the best static one (its ``note`` says so). ``device``: where messages are, for
    NCCL the GPU.

    Raises ``ValueError``, the same on every rank, for batches that differ between ranks or have no plan, and for a
    time-out below 0.
    """
    group = group_of(group)
    if cluster.devices != group.size:
        raise ValueError(f"{where(group)}: the cluster has {cluster.devices} devices, the group {group.size} ranks")
    if depth < 1:
        raise ValueError(f"{where(group)}: expected a depth of at least 1, got {depth}")
    if not timeout_seconds >= 0:
        raise ValueError(f"{where(group)}: expected a time-out of at least 0 seconds, got {timeout_seconds}")
    options = options or Options()
    making = Ahead(costs, cluster, options, timeout_seconds=timeout_seconds) if group.rank == 0 else nullcontext()
    coming, waiting = iter(batches), deque[tuple[T, tuple[int, ...]]]()
    with making as ahead:
        while True:
            for batch in islice(coming, depth + 1 - len(waiting)):
                waiting.append((batch, tuple(lengths(batch))))
                if ahead is not None:
                    ahead.ask(waiting[-1][1])
            if not waiting:
                return
            batch, sizes = waiting.popleft()
            plan = planned(_shared(_made(ahead), sizes, group, torch.device(device)))
            check(problem_of(sizes, cluster, costs), plan)
            yield batch, plan


def _made(ahead: Ahead | None) -> str:
    """The next plan, or why there is none; nothing on ranks that do not plan."""
    try:
        return "" if ahead is None else ahead.plan().to_json()
    except ValueError as error:
        return refusal(str(error))


def _shared(text: str, lengths: Sequence[int], group: Group, device: torch.device) -> str:
    """Rank 0's text, on every rank."""
    mine = (text_fingerprint(str(list(lengths))), f"{len(lengths)} documents, {sum(lengths)} tokens")
    check_same({"the batch's lengths": mine}, group, device)
    content = text.encode()
    size = int(group.all_reduce(torch.tensor([len(content)], device=device)).wait())
    buffer = torch.zeros(size, dtype=torch.uint8, device=device)
    if content:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return group.all_reduce(buffer).wait().cpu().numpy().tobytes().decode()
