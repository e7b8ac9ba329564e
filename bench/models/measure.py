"""Timing: every rank runs the case's step; a step takes as long as its slowest rank."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bench.models.cases import Case, Sizes
from seqpar import sequence_parallel
from seqpar.collectives import Group, Ledger
from seqpar.models import HybridConfig, HybridLM


@dataclass(frozen=True)
class Result:
    """The timings of one case, and what rank 0 sends in a step."""

    case: Case
    seconds: tuple[float, ...]
    bytes_: int

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)

    def ratio(self, base: "Result") -> float:
        """The median, over the rounds of one run, of this step's time over that of ``base``."""
        return median(mine / other for mine, other in zip(self.seconds, base.seconds))


def prepare(case: Case, sizes: Sizes, group: Group, dtype: torch.dtype) -> tuple[Callable[[], None], Ledger]:
    """A training step of ``case`` on the ranks of ``group``, and the ledger that counts what it sends."""
    torch.manual_seed(0)
    softmax = case.mixer == "softmax"
    dim = sizes.softmax_dim if softmax else sizes.dim
    config = HybridConfig(
        dim=dim,
        heads=dim // sizes.head_dim,
        layers=sizes.softmax_layers if softmax else sizes.layers,
        softmax_every=1 if softmax else 0,
    )
    ledger = Ledger(group)
    model = sequence_parallel(HybridLM(config).to(dtype), group=ledger, **case.cutting)
    tokens: Tensor = torch.randint(config.vocabulary, (1, case.tokens))

    def step() -> None:
        loss = model(tokens, labels=tokens, lengths=[case.tokens]).loss
        assert loss is not None
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step, ledger


def timed(step: Callable[[], None] | None, everyone: Group) -> float:
    """Seconds of one step, the slowest rank's; ranks without a part (None) wait."""
    everyone.all_reduce(torch.zeros(1)).wait()
    start = time.perf_counter()
    if step is not None:
        step()
    mine = torch.tensor([time.perf_counter() - start if step is not None else 0.0], dtype=torch.float64)
    return max(float(seconds) for seconds in everyone.all_gather(mine).wait())


def run_rounds(
    found: list[Case], sizes: Sizes, everyone: Group, rounds: int, dtype: torch.dtype, say: Callable[[str], None]
) -> list[Result]:
    """Time all cases round after round, so that a noisy minute touches every case alike."""
    groups = {count: everyone.partition(_first(count, everyone.size)) for count in sorted({c.ranks for c in found})}
    steps: list[Callable[[], None] | None] = []
    sent: list[int] = []
    for case in found:  # the warm-up also counts what is sent
        step, ledger = prepare(case, sizes, groups[case.ranks], dtype) if everyone.rank < case.ranks else (None, None)
        timed(step, everyone)
        steps.append(step)
        sent.append(ledger.bytes_ if ledger is not None else 0)
        say(f"warm-up  {case.name}")
    seconds: list[list[float]] = [[] for _ in found]
    for number in range(rounds):
        for index, case in enumerate(found):
            seconds[index].append(timed(steps[index], everyone))
            say(f"round {number + 1}/{rounds}  {case.name}  {seconds[index][-1]:.3f} s")
    return [Result(case, tuple(times), bytes_) for case, times, bytes_ in zip(found, seconds, sent)]


def _first(count: int, size: int) -> list[list[int]]:
    """The first ``count`` ranks together, every other one alone."""
    return [list(range(count)), *([rank] for rank in range(count, size))]
