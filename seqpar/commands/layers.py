"""``seqpar layers``: every token mixer, what of it crosses a cut and in how many bytes; and what a stack of them costs.

Exit status: 0, or 2 for input that cannot be used.
"""

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from seqpar.commands.arguments import count
from seqpar.commands.written import try_to_write, write

if TYPE_CHECKING:
    from rich.text import Text

    from seqpar.layers.entry import Entry, Sizes

DESCRIPTION = (
    "List the token mixers that models are built from: paper, what crosses a cut between two ranks, how many bytes in "
    "one forward pass, and how it may travel. With --pattern, price a decoder of them for the planner."
)

WIDTH = 100
_MOST_REPEATS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar layers``; ``parser.set_defaults(run=run)`` is set as well."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    parser.add_argument("--dim", type=count, default=2048, metavar="N", help="width of the layers (default: 2048)")
    parser.add_argument("--heads", type=count, default=16, metavar="N", help="heads of a layer (default: 16)")
    parser.add_argument("--tokens", type=count, default=8192, metavar="N", help="tokens of a rank (default: 8192)")
    price = parser.add_argument_group("a price for the planner")
    price.add_argument("--pattern", metavar="NAMES", help='layers of a decoder, such as "gla gla gla softmax"')
    price.add_argument("--repeats", type=count, default=8, metavar="N", help="of the pattern (default: 8)")
    price.add_argument("--gpu", default="H100-80G", metavar="NAME", help="as seqpar plan knows it (default: H100-80G)")
    price.add_argument("--devices", type=count, default=64, metavar="N", help="how many (default: 64)")
    price.add_argument("--costs", metavar="FILE", help="write the cost model there, for seqpar plan --model FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List or price; raises ``ValueError`` with one line for input that cannot be used."""
    if (arguments.costs is None) != (arguments.pattern is None):
        raise ValueError("--pattern and --costs go together: the price of a pattern is a file for seqpar plan")
    if arguments.dim % arguments.heads:
        raise ValueError(f"--heads {arguments.heads} must divide --dim {arguments.dim}")
    if arguments.repeats > _MOST_REPEATS:
        raise ValueError(f"--repeats {arguments.repeats}: expected at most {_MOST_REPEATS:,}")
    return _price(arguments) if arguments.pattern is not None else _list(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from seqpar.layers.catalog import CATALOG
    from seqpar.layers.entry import Sizes

    sizes = Sizes(arguments.dim, arguments.heads, layer=0, layers=12)
    if arguments.json:
        print(json.dumps([as_json(entry, sizes, arguments.tokens) for entry in CATALOG.values()], indent=2))
        return 0
    if arguments.markdown:
        print(markdown(list(CATALOG.values())))
        return 0
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(
        table(list(CATALOG.values()), sizes, arguments.tokens)
    )
    return 0


def markdown(entries: "list[Entry]") -> str:
    """The README's table."""
    rows = ["| layer | in patterns | paper | crosses a cut |", "|---|---|---|---|"]
    for entry in entries:
        crosses = entry.crosses if entry.status == "works" else f"({entry.status})"
        rows.append(f"| `{entry.layer}` | `{entry.name}` | {entry.paper} | {crosses} |")
    return "\n".join(rows)


def as_json(entry: "Entry", sizes: "Sizes", tokens: int) -> dict[str, Any]:
    """One row."""
    return {
        "name": entry.name,
        "layer": entry.layer,
        "paper": entry.paper,
        "crosses": entry.crosses,
        "bytes_per_cut": entry.bytes_per_cut(sizes, tokens) if entry.status == "works" else None,
        "transports": list(entry.transports),
        "scans": list(entry.scans),
        "layouts": list(entry.layouts),
        "causal": entry.causal,
        "status": entry.status,
    }


def table(entries: "list[Entry]", sizes: "Sizes", tokens: int) -> "Text":
    """Two lines a row, of at most ``WIDTH`` columns: names, the first paper, bytes and ways; below, what crosses."""
    from rich.text import Text

    found = Text()
    found.append(_line("in patterns", "layer", "paper", "bytes", "travels by"), style="bold")
    for entry in entries:
        works = entry.status == "works"
        size, ways = (f"{entry.bytes_per_cut(sizes, tokens):,}", _ways(entry)) if works else ("", "")
        found.append(_line(entry.name, entry.layer, entry.paper.split(";")[0], size, ways))
        found.append(f"  {_in_short(entry.crosses) if works else f'({entry.status})'}\n", style="dim")
    found.append(
        f"\nbytes: forward, fp32, one sequence, over the cut between ranks of {tokens:,} tokens; width {sizes.dim:,}\n"
        "*: and its decays, steps or matrix, unless a chain of ranks carries it. All papers and words: --json"
    )
    return found


def _line(name: str, layer: str, paper: str, size: str, ways: str) -> str:
    return f"{name:<23}{layer:<19}{paper:<17}{size:>12}  {ways}".rstrip() + "\n"


def _in_short(crosses: str) -> str:
    return re.sub(r" \(and [^()]*, unless a chain carries it\)", "*", crosses).replace(" before the convolution", "")


def _ways(entry: "Entry") -> str:
    ways = [*(["any transport"] if entry.transports else []), *(["any scan"] if entry.scans else [])]
    return ", ".join(ways) or "one way"


def _price(arguments: argparse.Namespace) -> int:
    from seqpar.estimates.pricing import decoder_shape
    from seqpar.planner import analytic_cluster, analytic_costs, costs_to_json

    ffn = -(-round(arguments.dim * 8 / 3) // 8) * 8
    shape = decoder_shape(arguments.pattern, arguments.repeats, arguments.dim, arguments.heads, ffn, 128_256)
    try_to_write(arguments.costs)
    cluster = analytic_cluster(arguments.devices, arguments.gpu)
    costs = analytic_costs(" ".join(arguments.pattern.split()), shape, arguments.gpu, cluster)
    write(arguments.costs, costs_to_json(costs, cluster))
    layers, states = shape.layers, shape.layers - shape.softmax_layers
    print(
        f"{layers} layers, {states} of which send {shape.sent_bytes / 2**20:,.1f} MiB over a cut, together; "
        f"seqpar plan --model {arguments.costs} plans with that"
    )
    return 0
