"""What it costs to plan how blocks travel: `python -m bench.plans.traveling --out FILE`.

One rank's plan (that of the middle one), from nothing, of a million tokens in 1, 100, 2,000 and 10,000 documents on 8,
64 and 1,024 ranks, for every layout and transport, in processor seconds: the least of some rounds, so that a busy
machine matters little. Its input is what a plan is made of: documents, the parts of the sequence that ranks hold, the
pieces of documents in them (all to all: in the sequence on one rank), and the pairs of pieces that meet here (each is a
tile of attention). The growth from one number of documents or ranks to the next is the ratio of seconds over that of
inputs, less than 20 ms counted as 20 ms; it should be at most 1.3.
"""

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from bench.models import rows
from seqpar import Shard
from seqpar.commands.arguments import Parser, count
from seqpar.crossing.meetings import View, meetings
from seqpar.crossing.transports import gather_plan, ring_plan
from seqpar.sharding.relayout import _moves
from seqpar.sharding.shard import dealt, in_sequence

DOCUMENTS, RANKS = (1, 100, 2_000, 10_000), (8, 64, 1_024)
PARTS = {"contiguous": 1, "zigzag": 2, "striped": 1, "fragments": 3}  # of the sequence, on each rank
VIEWS = {"causal": View(True, None), "full": View(False, None), "window": View(True, 128)}
ROUNDS = 3  # far apart: a machine is busy for a while, then is not
FLOOR_SECONDS = 0.02  # what is faster is too noisy to be compared
ALLOWED = 1.3


class Place(NamedTuple):
    """A rank that plans and sends nothing."""

    rank: int
    size: int


@dataclass(frozen=True)
class Planned:
    """One plan. ``input``: documents + parts on ranks + pieces (all to all: of the whole) + pairs that meet here."""

    transport: str
    view: str
    layout: str
    documents: int
    ranks: int
    pieces: int
    meet: int
    input: int
    seconds: float


def by_heads(shard: Shard, view: View) -> None:
    """All to all: the whole sequence on one rank, and how rows come into order and back."""
    ring_plan(shard.together, view)
    in_sequence(shard)
    dealt(shard)


def relayout(shard: Shard, view: View) -> None:
    """To a contiguous layout, as recurrences of striped tokens."""
    _moves(shard, shard.contiguous)


PLANS: dict[str, Callable[[Shard, View], Any]] = {
    "ring": ring_plan,
    "all_gather": gather_plan,
    "all_to_all": by_heads,
    "relayout": relayout,
}


def forget() -> None:
    """Every plan that was made."""
    for name, module in list(sys.modules.items()):
        if name.startswith("seqpar."):
            for value in list(vars(module).values()):
                getattr(value, "cache_clear", lambda: None)()


def shard_of(tokens: int, documents: int, ranks: int, layout: str) -> Shard:
    """Fragments: three parts of the sequence to each rank, far apart."""
    bounds = [tokens * i // documents for i in range(documents + 1)]
    lengths = [stop - start for start, stop in pairwise(bounds)]
    group: Any = Place(ranks // 2, ranks)
    if layout != "fragments":
        return Shard.of(lengths, group, layout)
    cuts = [tokens * i // (3 * ranks) for i in range(3 * ranks + 1)]
    fragments = [[(cuts[r + k * ranks], cuts[r + k * ranks + 1]) for k in range(3)] for r in range(ranks)]
    return Shard.of(lengths, group, fragments=fragments)


def measure(transport: str, view: str, layout: str, tokens: int, documents: int, ranks: int) -> Planned:
    forget()
    gc.collect()  # each plan pays for its own objects only
    began = time.thread_time()
    shard = shard_of(tokens, documents, ranks, layout)
    PLANS[transport](shard, VIEWS[view])
    seconds = time.thread_time() - began
    seen = shard.together if transport == "all_to_all" else shard
    meet = 0 if transport == "relayout" else len(meetings(seen.pieces.of(seen.rank), seen.pieces, VIEWS[view]).key)
    pieces = len(seen.pieces)
    size = documents + PARTS[layout] * ranks + pieces + meet
    return Planned(transport, view, layout, documents, ranks, pieces, meet, size, seconds)


def cases() -> Iterator[tuple[str, str, str]]:
    """Transport, view, layout."""
    for layout in PARTS:
        for transport in PLANS:
            for view in VIEWS if transport in ("ring", "all_gather") else ("causal",):
                yield transport, view, layout


def growths(found: Sequence[Planned]) -> Iterator[tuple[float, Planned]]:
    """From every plan to those with the next number of documents, or of ranks: how much faster seconds grow."""
    at = {(each.documents, each.ranks): each for each in found}
    documents, ranks = (sorted({place[axis] for place in at}) for axis in (0, 1))
    steps = [((d, r), (e, r)) for d, e in pairwise(documents) for r in ranks]
    steps += [((d, r), (d, s)) for r, s in pairwise(ranks) for d in documents]
    for few, many in steps:
        less, more = at[few], at[many]
        seconds = max(more.seconds, FLOOR_SECONDS) / max(less.seconds, FLOOR_SECONDS)
        yield seconds / max(1.0, more.input / less.input), more


def grouped(plans: Sequence[Planned]) -> dict[tuple[str, str, str], list[Planned]]:
    found: dict[tuple[str, str, str], list[Planned]] = {}
    for each in plans:
        found.setdefault((each.transport, each.view, each.layout), []).append(each)
    return found


def show(plans: Sequence[Planned]) -> None:
    from rich.console import Console
    from rich.table import Table

    documents, ranks = (sorted({each[axis] for each in ((p.documents, p.ranks) for p in plans)}) for axis in (0, 1))
    table = Table("transport", "view", "layout", *(f"{d:,}" for d in documents), "slowest", "growth")
    for (transport, view, layout), found in grouped(plans).items():
        columns = [f"{each.seconds * 1e3:,.0f}" for each in found if each.ranks == ranks[-1]]
        slowest = max(found, key=lambda each: each.seconds)
        growth = max(growths(found), default=(0.0, slowest), key=lambda each: each[0])[0]
        table.add_row(transport, view, layout, *columns, f"{slowest.seconds * 1e3:,.0f}", f"{growth:.2f}")
    console = Console(width=110)
    console.print(f"Milliseconds by documents on {ranks[-1]:,} ranks; slowest and growth: of all sizes", table)
    every = [each for found in grouped(plans).values() for each in growths(found)]
    if not every:
        return
    worst, where = max(every, key=lambda each: each[0])
    console.print(
        f"Largest growth: {worst:.2f} times that of its input (allowed {ALLOWED}), {where.transport} {where.view} "
        f"{where.layout}, {where.documents:,} documents on {where.ranks:,} ranks"
    )


def plot(plans: Sequence[Planned], path: Path) -> None:
    """Seconds over input, one panel a transport, a line of slope 1 beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PLANS), figsize=(13, 4), sharex=True, sharey=True)
    for axis, transport in zip(axes, PLANS):
        for layout, colour in zip(PARTS, ("#084594", "#4292c6", "#d94801", "#74a057")):
            chosen = [each for each in plans if (each.transport, each.layout) == (transport, layout)]
            places = ([each.input for each in chosen], [each.seconds for each in chosen])
            axis.plot(*places, "o", markersize=4, alpha=0.7, color=colour, label=layout)
        axis.plot([1e1, 4e6], [1e-5, 4], "--", color="black", linewidth=0.8, label="1 µs per item")
        axis.set(xscale="log", yscale="log", title=transport, xlabel="documents + parts + pieces + pairs")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("processor seconds of one rank's plan")
    axes[-1].legend(fontsize=8, loc="lower right")
    rows.save(figure, path)


def arguments_of() -> argparse.Namespace:
    parser = Parser(prog="python -m bench.plans.traveling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=count, default=1 << 20, metavar="N")
    parser.add_argument("--documents", nargs="+", type=count, default=list(DOCUMENTS), metavar="N")
    parser.add_argument("--ranks", nargs="+", type=count, default=list(RANKS), metavar="N")
    parser.add_argument("--out", type=rows.file, metavar="FILE", help="write JSON there")
    parser.add_argument("--plot", type=rows.picture, metavar="FILE", help="draw it: .svg or .png")
    return parser.parse_args()


def main() -> int:
    arguments = arguments_of()
    for case in cases():
        measure(*case, 1_000, 10, 2)  # what is imported or set up once is there
    forget()
    gc.collect()
    gc.freeze()  # what was imported is not looked at by each collection
    places = [(d, r) for r in arguments.ranks for d in arguments.documents]
    rounds = [[measure(*case, arguments.tokens, *at) for case in cases() for at in places] for _ in range(ROUNDS)]
    plans = [min(tries, key=lambda each: each.seconds) for tries in zip(*rounds)]
    show(plans)
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    report = {
        "command": " ".join(["python -m bench.plans.traveling", *sys.argv[1:]]),
        "machine": f"{machine}, numpy {numpy.__version__}",
        "input": "documents + parts on ranks + pieces in them (all_to_all: in the whole) + pairs that meet here",
        "seconds": f"of the thread's processor time, the least of {ROUNDS} rounds",
        "tokens": arguments.tokens,
        "plans": [asdict(each) for each in plans],
    }
    rows.write(report, arguments.out)
    if arguments.plot:
        plot(plans, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
