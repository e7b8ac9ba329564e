"""``seqpar place``: give every buffer of a placement file an address, and say how good that is. Needs no GPU.

Exit status: 0 for a placement (within the capacity, if one is given), 1 if none was found within the capacity, 2 for
input that cannot be used.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from seqpar.commands.arguments import count, seconds
from seqpar.commands.written import try_to_write, write

if TYPE_CHECKING:
    from rich.table import Table

    from seqpar.offload.placement.buffers import Buffer, Placement
    from seqpar.offload.placement.place import Progress

DESCRIPTION = (
    "Give every buffer of a CSV file (columns id,lower,upper,size; a life is [lower, upper)) an offset, so that no two "
    "share bytes while both live, and say how far the peak is from the least possible."
)
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar place``; ``parser.set_defaults(run=run)`` is set as well."""
    parser.add_argument("file", metavar="FILE.csv", help="the buffers, one a line, with a header id,lower,upper,size")
    capacity = "stop at a placement within N bytes (default: aim at the least possible)"
    parser.add_argument("--capacity", type=count, metavar="N", help=capacity)
    work = "work, as seconds of a free core (default: 60)"
    parser.add_argument("--seconds", type=seconds, default=60.0, metavar="S", help=work)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE", help="draw addresses over time into a .svg or .png")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Place and show; returns the exit status. Raises ``ValueError`` with one line for input that cannot be used."""
    from seqpar.offload.placement.check_placement import check_placement
    from seqpar.offload.placement.place import place
    from seqpar.offload.placement.place_plot import format_of, picture
    from seqpar.offload.placement.placement_file import read_placement_file

    if arguments.plot is not None:
        format_of(arguments.plot)
        try_to_write(arguments.plot)
    buffers = read_placement_file(arguments.file)
    with _progress() as progress:
        found = place(buffers, arguments.capacity, arguments.seconds, progress)
    check_placement(buffers, found)
    if arguments.plot is not None:
        write(arguments.plot, picture(buffers, found, format_of(arguments.plot), arguments.capacity))
    if arguments.json:
        print(_json(found))
    else:
        _show(arguments, buffers, found)
    return 0 if arguments.capacity is None or found.peak <= arguments.capacity else 1


def _json(found: "Placement") -> str:
    return json.dumps(
        {
            "peak": found.peak,
            "lower_bound": found.lower_bound,
            "status": found.status,
            "stage": found.stage,
            "seconds": round(found.seconds, 3),
            "note": found.note,
            "offsets": dict(found.offsets),
        }
    )


def _show(arguments: argparse.Namespace, buffers: "Sequence[Buffer]", found: "Placement") -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a pipe has no width of its own
        console = Console(width=_WIDTH)
    console.print(_table(arguments, buffers, found))


def _table(arguments: argparse.Namespace, buffers: "Sequence[Buffer]", found: "Placement") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("", "bytes", "", title=Text(Path(arguments.file).name), title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("all buffers", f"{sum(buffer.size for buffer in buffers):,}", f"{len(buffers)} buffers")
    table.add_row("lower bound", f"{found.lower_bound:,}", "no placement has a lower peak")
    gap = "certified" if found.status == "optimal" else f"{found.gap:.2%} above the lower bound"
    table.add_row("peak", f"{found.peak:,}", f"{found.status}: {gap}")
    if arguments.capacity is not None:
        table.add_row("capacity", f"{arguments.capacity:,}", _verdict(found, arguments.capacity))
    table.add_row("found by", "", f"{found.stage}, {found.seconds:.2f} s")
    if found.note:
        table.add_row("note", "", found.note)
    return table


def _verdict(found: "Placement", capacity: int) -> str:
    if found.peak <= capacity:
        return "fits"
    return "proved too small" if found.lower_bound > capacity else "no placement within it was found"


@contextmanager
def _progress() -> "Iterator[Progress | None]":
    """A line on stderr that says how far the hunt is and goes away, if someone is looking."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with console.status("placing") as status:

        def step(stage: str, peak: int, low: int) -> None:
            status.update(f"{stage}; peak {peak:,}, {peak / max(low, 1) - 1:.2%} above the lower bound")

        yield step
