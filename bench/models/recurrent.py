"""Recurrent layers over cuts: ``torchrun --standalone --nproc-per-node 2 -m bench.models.recurrent [--out FILE]``.

Speed: the recurrence of an LSTM beside ``torch.nn.LSTM`` of the same sizes, forward and backward, on one thread, turn
by turn. Wavefront: twelve layers on two processes beside one of them alone, turn by turn, forward and backward; when
each layer ran on which process is what ``--plot`` draws.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import rows
from seqpar import Cut, Shard, connect
from seqpar.collectives import Group
from seqpar.commands.arguments import count
from seqpar.layers import LSTM

LAYERS, DIM, TOKENS = 12, 256, 4096
SPEED_TOKENS = 1024
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Ran:
    """A layer's cell from ``start`` to ``end``, in seconds since the step began."""

    layer: int
    backward: bool
    start: float
    end: float


def speed(heads: int, rounds: int) -> dict[str, Any]:
    """The recurrence of ``heads`` heads beside as many of torch's LSTMs, each ``DIM / heads`` wide."""
    x = torch.randn(1, SPEED_TOKENS, DIM)
    ours = LSTM(DIM, heads)
    theirs = nn.ModuleList(nn.LSTM(DIM, DIM // heads, batch_first=True) for _ in range(heads))
    cut = Cut.whole([SPEED_TOKENS])

    def run_ours() -> None:
        ours.mix((x.clone().requires_grad_(),), cut).sum().backward()

    def run_theirs() -> None:
        whole = x.clone().requires_grad_()
        torch.cat([each(whole)[0] for each in theirs], -1).sum().backward()

    found: list[tuple[float, float]] = [
        (timed(run_ours, time.process_time), timed(run_theirs, time.process_time)) for _ in range(rounds + 1)
    ][1:]
    ratio = median(mine / other for mine, other in found)
    return {"heads": heads, "seconds": median(mine for mine, _ in found), "ratio": ratio}


def timed(step: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    step()
    return clock() - began


class Stack:
    """Layers of one process, whose cells note down when they run."""

    def __init__(self, group: Group, layout: str) -> None:
        torch.manual_seed(0)
        self.group, self.shard = group, Shard.of([TOKENS], group, layout)
        self.layers = [LSTM(DIM, 1) for _ in range(LAYERS)]
        self.x = self.shard.take(torch.randn(1, TOKENS, DIM))
        self.ran: list[Ran] = []

    def step(self) -> None:
        """Forward and backward of all layers."""
        began, self.ran = time.perf_counter(), []
        out = self.x.clone().requires_grad_()
        for number, layer in enumerate(self.layers):
            out = _noted(out, self, number, began, True)
            out = layer(out, Cut(self.shard, self.group))
            out = _noted(out, self, number, began, False)
        out.sum().backward()
        for layer in self.layers:
            layer.zero_grad()


class _Noted(torch.autograd.Function):
    """Passes ``x`` on and notes the time: at a layer's input when it begins, at its output when it is done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[bool], None]) -> Tensor:
        ctx.note = note
        note(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.note(True)
        return grads[0], None


def _noted(x: Tensor, stack: Stack, number: int, began: float, at_input: bool) -> Tensor:
    def note(backward: bool) -> None:
        now = time.perf_counter() - began
        if at_input != backward:
            stack.ran.append(Ran(number, backward, now, now))
        else:
            last = stack.ran[-1]
            stack.ran[-1] = Ran(last.layer, last.backward, last.start, now)

    result: Tensor = _Noted.apply(x, note)
    return result


def wavefront(everyone: Group, layout: str, rounds: int) -> tuple[dict[str, Any], list[list[Ran]]]:
    """The fastest step of both processes over that of the first one alone, as others on a machine can only add to
    either; and when layers ran in it."""
    alone = everyone.partition([[rank] for rank in range(everyone.size)])
    one, both = Stack(alone, "contiguous"), Stack(everyone, layout)
    of_one, of_both, ran = [], [], []
    for _ in range(rounds + 1):
        of_one.append(_slowest(everyone, one if everyone.rank == 0 else None))
        of_both.append(_slowest(everyone, both))
        ran.append(both.ran)
    fastest = min(of_both)
    result = {"layers": LAYERS, "processes": everyone.size, "layout": layout, "ratio": fastest / min(of_one),
              "seconds": of_both, "of_one": of_one}  # fmt: skip
    return result, _everyones(everyone, ran[of_both.index(fastest)])


def _slowest(everyone: Group, stack: Stack | None) -> float:
    everyone.all_reduce(torch.zeros(1)).wait()
    seconds = 0.0 if stack is None else timed(stack.step)
    return max(float(x) for x in everyone.all_gather(torch.tensor([seconds], dtype=torch.float64)).wait())


def _everyones(everyone: Group, ran: list[Ran]) -> list[list[Ran]]:
    mine = torch.tensor([[each.layer, each.backward, each.start, each.end] for each in ran], dtype=torch.float64)
    return [
        [Ran(int(row[0]), bool(row[1]), float(row[2]), float(row[3])) for row in part]
        for part in everyone.all_gather(mine).wait()
    ]


def draw(ran: list[list[Ran]], ratio: float, path: Path) -> None:
    """A line per process; forward above, backward below it, dark layers last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 2.6))
    for rank, part in enumerate(ran):
        for each in part:
            colour = pyplot.get_cmap("Oranges" if each.backward else "Blues")(0.25 + 0.6 * each.layer / LAYERS)
            axes.barh(rank, each.end - each.start, 0.7, each.start, color=colour, edgecolor="white", linewidth=0.5)
            axes.text((each.start + each.end) / 2, rank, each.layer + 1, ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(ran)), [f"process {rank}" for rank in range(len(ran))])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(
        f"{LAYERS} LSTM layers of {TOKENS} tokens on {len(ran)} processes, forward (blue) and backward (orange): "
        f"{ratio:.2f} of one",
        fontsize=9,
    )
    rows.save(figure, path)


def main() -> int:
    parser = rows.parser_of("bench.models.recurrent", __doc__)
    parser.add_argument("--rounds", type=count, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everyone = connect()
    found: dict[str, Any] = {"speed": [], "wavefront": []}
    for layout, rounds in (("contiguous", arguments.rounds), ("zigzag", 2)):
        result, ran = wavefront(everyone, layout, rounds)
        found["wavefront"].append(result)
        if layout == "contiguous" and arguments.plot and everyone.rank == 0:
            draw(ran, result["ratio"], arguments.plot)
    if everyone.rank == 0:
        found["speed"] = [speed(heads, 3 * arguments.rounds) for heads in (1, 4)]
        print(*found["speed"], *found["wavefront"], sep="\n")
        rows.write(rows.report_of("bench.models.recurrent", arguments, found), arguments.out)
    everyone.all_reduce(torch.zeros(1)).wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
