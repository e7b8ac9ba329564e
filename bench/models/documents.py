"""What many documents cost beside one of as many tokens: `python -m bench.models.documents --out FILE`.

Every layer of the catalog, forward and backward, fp32, one rank, one CPU thread, in three batches of as many tokens:
`one` document (several for a layer that takes no longer ones), `many` documents of random lengths, and `mixed`: half of
the tokens in one document, the others in tiny ones. Ratios are those of processor seconds of steps next to each other,
and of these the median. `new`: the same of steps whose documents no step had before, so that everything is planned.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from bench.models import layers, rows
from seqpar import Cut, Shard
from seqpar.collectives import alone
from seqpar.commands.arguments import count
from seqpar.layers.entry import Entry, Sizes
from seqpar.layers.local.catalog_local import GRID_WIDTH

TOKENS, DOCUMENTS = 16384, 2000
AIM = 1.5
QUADRATIC = ("softmax",)  # rows whose work grows with the square of a document: many cost less than one


@dataclass(frozen=True)
class Measured:
    """``seconds`` of one document; ratios to it. ``documents``: how many there were of ``many``."""

    name: str
    documents: int
    seconds: float
    many: float
    mixed: float
    new: float


def unit_of(name: str) -> int:
    """Of how many tokens, or a multiple, a document must be: ViG's fill rows of a grid."""
    return GRID_WIDTH if name == "vig" else 1


def drawn(tokens: int, documents: int, unit: int, generator: torch.Generator) -> list[int]:
    """Lengths of at least ``unit`` tokens and multiples of it, all equally likely; fewer documents if they must be."""
    units = tokens // unit
    places = torch.randperm(units - 1, generator=generator)[: min(documents, units) - 1] + 1
    edges = torch.cat([torch.tensor([0]), places.sort().values, torch.tensor([units])])
    return (edges.diff() * unit).tolist()


def mixed(layer: nn.Module, tokens: int, documents: int, unit: int, generator: torch.Generator) -> list[int]:
    """Tiny documents on either side of a long one of half the tokens, or the longest that the layer takes."""
    long = min(tokens // 2 // unit * unit, getattr(layer, "max_tokens", tokens))
    tiny = drawn(tokens - long, documents - 1, unit, generator)
    return [*tiny[::2], long, *tiny[1::2]]


def seconds_of(layer: nn.Module, shard: Shard, dim: int) -> float:
    """Processor seconds of a step."""
    x = torch.randn(1, shard.num_tokens, dim)
    began = time.process_time()
    layers.step(layer, x, Cut(shard, shard.group))
    return time.process_time() - began


def measure(entry: Entry, arguments: argparse.Namespace) -> Measured:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    layer = entry.make(Sizes(arguments.dim, arguments.heads, 1, 4))
    sizes = (arguments.documents, unit_of(entry.name), generator)
    tokens = arguments.tokens // unit_of(entry.name) * unit_of(entry.name)
    shards = [
        Shard.of(lengths, alone())
        for lengths in (layers.documents(layer, tokens), drawn(tokens, *sizes), mixed(layer, tokens, *sizes))
    ]
    for shard in shards:
        seconds_of(layer, shard, arguments.dim)
    found = []
    for _ in range(arguments.rounds):
        new = Shard.of(drawn(tokens, *sizes), alone())
        found.append([seconds_of(layer, shard, arguments.dim) for shard in (*shards, new)])
    ratios = [statistics.median(each[place] / each[0] for each in found) for place in (1, 2, 3)]
    return Measured(entry.name, len(shards[1].lengths), statistics.median(each[0] for each in found), *ratios)


def show(found: Sequence[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "documents", "seconds of one", "many", "mixed", "many, new", title=f"aim: {AIM}")
    for row in found:
        ratios = [f"{row[key]:.2f}{' !' if row[key] > AIM else ''}" for key in ("many", "mixed", "new")]
        table.add_row(row["name"], str(row["documents"]), f"{row['seconds']:.3f}", *ratios)
    Console(width=100).print(table)


def plot(found: Sequence[dict], path: Path) -> None:
    figure, left, right = rows.panels([row["name"] for row in found])
    for axes, keys, label in ((left, ("many", "new"), "many documents"), (right, ("mixed",), "one long, many tiny")):
        for key, colour in zip(keys, ("#084594", "#9ecae1")):
            axes.plot([row[key] for row in found], range(len(found)), "o", color=colour, label=key)
        axes.axvline(AIM, color="black", linewidth=0.8)
        axes.set_xlabel(f"{label}: time over that of one document")
        axes.legend(fontsize=8)
    rows.save(figure, path)


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--tokens", type=count, default=TOKENS, help=f"of a batch ({TOKENS})")
    parser.add_argument("--documents", type=count, default=DOCUMENTS, help=f"of many ({DOCUMENTS})")
    parser.add_argument("--dim", type=count, default=64)
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--rounds", type=count, default=5, help="pairs of steps (5)")
    arguments = parser.parse_args()
    if arguments.dim % arguments.heads:
        parser.error(f"--heads {arguments.heads} must divide --dim {arguments.dim}")
    if not 2 <= arguments.documents <= arguments.tokens // 2:
        parser.error(f"--documents must be 2 to {arguments.tokens // 2}, half of --tokens, got {arguments.documents}")
    if arguments.tokens < 64:
        parser.error(f"--tokens must be at least 64, got {arguments.tokens}")
    return arguments


def main() -> int:
    parser = rows.parser_of("bench.models.documents", __doc__)
    arguments = arguments_of(parser)
    entries = rows.rows_of(parser, arguments)
    torch.set_num_threads(1)
    sizes = {key: getattr(arguments, key) for key in ("tokens", "documents", "dim", "heads", "rounds")}
    report = rows.report_of("bench.models.documents", arguments, {"aim": AIM, "sizes": sizes, "rows": []})
    done = {row["name"] for row in report["rows"]}
    for entry in entries:
        if entry.name not in done and entry.name not in QUADRATIC:
            report["rows"].append(asdict(measure(entry, arguments)))
            print(json.dumps(report["rows"][-1]), flush=True)
            rows.write(report, arguments.out)
    show(report["rows"])
    if arguments.plot:
        plot(report["rows"], arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
