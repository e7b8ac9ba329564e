"""Speed and memory of every layer of the catalog, and what a cut costs: `python -m bench.models.layers --out FILE`.

One layer each, forward and backward, fp32, on CPU (`--device cuda` on a GPU): tokens per second at 4K, 16K and 64K
tokens; the bytes that backward keeps; and the work of 2 and 4 ranks over that of one, as processor seconds of all
ranks together on one and the same core, where two threads cannot slow each other down. The tokens are one document, or
several as long as the layer can take.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.models import rows
from seqpar import Cut, Shard
from seqpar.collectives import Group, run_ranks
from seqpar.commands.arguments import count
from seqpar.layers.entry import Entry, Sizes
from seqpar.training.device_memory import saved_bytes

LENGTHS = (4096, 16384, 65536)
RANKS = (2, 4)
LONGEST_SECONDS = 60.0  # a length is left out if the one before it says that it takes longer
TIMES, ENOUGH_SECONDS = 3, 10.0


@dataclass(frozen=True)
class Measured:
    """``tokens_per_second`` by length (None: left out). ``kept_bytes``: per token, for backward, of width-``dim``
    fp32 layers. ``work``: processor seconds of all ranks over those of one, by ranks."""

    name: str
    tokens_per_second: dict[int, float | None] = field(default_factory=dict)
    kept_bytes: float = 0.0
    work: dict[int, float] = field(default_factory=dict)


def documents(layer: nn.Module, tokens: int) -> list[int]:
    """Lengths that the layer can take: Linformer has weights for so many positions."""
    longest = getattr(layer, "max_tokens", tokens)
    return [min(longest, tokens - first) for first in range(0, tokens, longest)]


def step(layer: nn.Module, x: Tensor, cut: Cut) -> None:
    """Forward and backward of my tokens."""
    x = x.detach().requires_grad_()
    y = layer(x, cut)
    y.backward(torch.ones_like(y))
    for parameter in layer.parameters():
        parameter.grad = None


def seconds_of(layer: nn.Module, x: Tensor) -> float:
    """The median of three steps, of fewer if they are long."""
    cut, found = Cut.whole(documents(layer, x.shape[1])), []
    while len(found) < TIMES and sum(found) < ENOUGH_SECONDS:
        began = time.perf_counter()
        step(layer, x, cut)
        if x.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def speeds(layer: nn.Module, dim: int, device: str, lengths: tuple[int, ...]) -> dict[int, float | None]:
    """Tokens per second of one rank."""
    found: dict[int, float | None] = {}
    step(layer, torch.randn(1, 256, dim, device=device), Cut.whole([256]))  # warm up
    expected = 0.0
    for tokens in lengths:
        if expected > LONGEST_SECONDS:
            found[tokens] = None
            continue
        seconds = seconds_of(layer, torch.randn(1, tokens, dim, device=device))
        expected = 16 * seconds  # of four times the tokens, at worst
        found[tokens] = tokens / seconds
    return found


def kept_bytes(layer: nn.Module, x: Tensor) -> float:
    """Bytes per token that autograd keeps, each storage once, parameters left out."""
    cut = Cut.whole(documents(layer, x.shape[1]))
    return saved_bytes(lambda: layer(x.requires_grad_(), cut), layer.parameters()) / x.shape[1]


@contextmanager
def one_core() -> Iterator[None]:
    """Threads that start in here stay on one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def works_of(layer: nn.Module, x: Tensor) -> dict[int, float]:
    """Processor seconds of all ranks over those of one: the median of ratios, each of steps next to each other."""
    found: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    with one_core():
        for ranks in (1, *RANKS):
            processor_seconds(layer, x, ranks)  # warm up
        for _ in range(TIMES):
            one = processor_seconds(layer, x, 1)
            for ranks in RANKS:
                found[ranks].append(processor_seconds(layer, x, ranks) / one)
    return {ranks: statistics.median(each) for ranks, each in found.items()}


def processor_seconds(layer: nn.Module, x: Tensor, ranks: int) -> float:
    """Of one step of all ranks, which are threads of this process."""

    def body(group: Group) -> None:
        shard = Shard.of(documents(layer, x.shape[1]), group)
        step(copy.deepcopy(layer), shard.take(x), Cut(shard, group, transport="all_gather"))

    began = time.process_time()
    run_ranks(ranks, body, timeout_seconds=300)
    return time.process_time() - began


def measure(entry: Entry, arguments: argparse.Namespace) -> Measured:
    torch.manual_seed(0)
    layer = entry.make(Sizes(arguments.dim, arguments.heads, 1, 4)).to(arguments.device)
    found = speeds(layer, arguments.dim, arguments.device, tuple(arguments.tokens))
    middle = sorted(arguments.tokens)[len(arguments.tokens) // 2]
    x = torch.randn(1, middle, arguments.dim, device=arguments.device)
    work = works_of(layer, x) if arguments.device == "cpu" else {}
    return Measured(entry.name, found, kept_bytes(layer, x), work)


def show(layers: Sequence[dict], lengths: Sequence[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "layer", *(f"{tokens // 1024}K tokens/s" for tokens in lengths), "kept bytes/token", "2 ranks", "4 ranks"
    )
    for row in layers:
        rates = [row["tokens_per_second"].get(str(tokens)) for tokens in lengths]
        shown = ["-" if rate is None else f"{rate:,.0f}" for rate in rates]
        table.add_row(row["name"], *shown, f"{row['kept_bytes']:,.0f}", *(f"{w:.2f}" for w in row["work"].values()))
    Console(width=110).print(table, "2 ranks, 4 ranks: work of all ranks together over that of one", _medians(layers))


def _medians(layers: Sequence[dict]) -> str:
    there = {ranks: [row["work"][str(ranks)] for row in layers if str(ranks) in row["work"]] for ranks in RANKS}
    return ", ".join(f"{ranks} ranks: median {statistics.median(work):.2f}" for ranks, work in there.items() if work)


def plot(layers: Sequence[dict], lengths: Sequence[int], path: Path) -> None:
    figure, left, right = rows.panels([row["name"] for row in layers])
    for tokens, colour in zip(lengths, ("#9ecae1", "#4292c6", "#084594")):
        rates = [row["tokens_per_second"].get(str(tokens)) or float("nan") for row in layers]
        left.plot(rates, range(len(layers)), "o", color=colour, label=f"{tokens // 1024}K tokens")
    left.set_xscale("log")
    left.set_xlabel("tokens per second, forward and backward")
    left.legend(loc="lower left", fontsize=8)
    for ranks, colour in zip(RANKS, ("#fdae6b", "#d94801")):
        work = [row["work"].get(str(ranks), float("nan")) for row in layers]
        right.plot(work, range(len(layers)), "s", color=colour, label=f"{ranks} ranks")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("work of all ranks over that of one")
    right.legend(fontsize=8)
    rows.save(figure, path)


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--tokens", nargs="+", type=count, default=list(LENGTHS), metavar="N")
    parser.add_argument("--dim", type=count, default=64)
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.dim % arguments.heads:
        parser.error(f"--heads {arguments.heads} must divide --dim {arguments.dim}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    return arguments


def main() -> int:
    parser = rows.parser_of("bench.models.layers", __doc__)
    arguments = arguments_of(parser)
    entries = rows.rows_of(parser, arguments)
    sizes = {"dim": arguments.dim, "heads": arguments.heads}
    report = rows.report_of("bench.models.layers", arguments, {"sizes": sizes, "layers": []})
    done = {row["name"] for row in report["layers"]}
    for entry in entries:
        if entry.name in done:
            continue
        began = time.perf_counter()
        report["layers"].append(asdict(measure(entry, arguments)))
        print(f"{entry.name}: {time.perf_counter() - began:.1f} s", flush=True)
        rows.write(report, arguments.out)
    found = json.loads(json.dumps(report["layers"]))  # new rows as those read back: numbers as keys are strings there
    show(found, arguments.tokens)
    if arguments.plot:
        plot(found, arguments.tokens, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
