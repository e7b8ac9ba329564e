"""`python -m bench.plans.placement`: how many of the public minimalloc problems are placed within their capacity.

A row for each problem: buffers, lower bound, the best greedy peak, and what `seqpar.offload.place` found in how many
seconds, every placement looked at by the independent checker. Runs on one core. Writes JSON with --out.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.check_placement import check_placement
from seqpar.offload.placement.greedy import greedy_placements
from seqpar.offload.placement.place import place
from seqpar.offload.placement.placement_file import read_placement_file

MINIMALLOC = Path(__file__).parents[1] / "data" / "minimalloc"


@dataclass(frozen=True)
class Result:
    """One problem: its size, and what was found at its capacity."""

    name: str
    buffers: int
    capacity: int
    lower_bound: int
    greedy_peak: int
    peak: int
    fits: bool
    status: str
    gap: float
    stage: str
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run all problems; returns 0 if every one was placed within its capacity."""
    parser = argparse.ArgumentParser(prog="python -m bench.plans.placement", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=MINIMALLOC, help="folder of NAME.CAPACITY.csv files (those of MiniMalloc)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of one problem (60)")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args(argv)
    problems = sorted(path for path in arguments.data.glob("*.*.csv") if path.stem.split(".")[-1].isdigit())
    if not problems:
        parser.error(f"--data {arguments.data}: no NAME.CAPACITY.csv there; leave it out for those of MiniMalloc")
    started = time.time()
    results: list[Result] = []
    console = Console(stderr=True)
    for path in problems:
        with console.status(f"{path.name} ({len(results)} of {len(problems)} done)"):
            results.append(measure(path, arguments.seconds))
    _show(results)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(_report(results, arguments.seconds, started), indent=1) + "\n")
    return 0 if all(result.fits for result in results) else 1


def measure(path: Path, seconds: float) -> Result:
    """Place one problem at the capacity in its name, and check what comes back."""
    name, capacity = path.stem.split(".")[0], int(path.stem.split(".")[-1])
    buffers = read_placement_file(path)
    found = place(buffers, capacity, seconds)
    check_placement(buffers, found)
    return Result(
        name=name,
        buffers=len(buffers),
        capacity=capacity,
        lower_bound=found.lower_bound,
        greedy_peak=best_greedy(buffers),
        peak=found.peak,
        fits=found.peak <= capacity,
        status=found.status,
        gap=found.gap,
        stage=found.stage,
        seconds=found.seconds,
    )


def best_greedy(buffers: Sequence[Buffer]) -> int:
    """The lowest peak of all greedy orders."""
    return min(found.peak for found in greedy_placements(buffers))


def _show(results: Sequence[Result]) -> None:
    columns = ("problem", "buffers", "bound / cap.", "greedy / bound", "peak / cap.", "fits", "status", "by", "seconds")
    table = Table(*columns, title="Placement within the capacity")
    for result in results:
        table.add_row(
            result.name,
            str(result.buffers),
            f"{result.lower_bound / result.capacity:.3f}",
            f"{result.greedy_peak / result.lower_bound:.3f}",
            f"{result.peak / result.capacity:.3f}",
            "yes" if result.fits else f"no, {result.peak / result.capacity - 1:.1%} over",
            result.status,
            result.stage,
            f"{result.seconds:.2f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    print(f"{sum(result.fits for result in results)} of {len(results)} fit")


def _report(results: Sequence[Result], seconds: float, started: float) -> dict[str, object]:
    return {
        "what": "placements within the capacity, each checked independently; one process, one thread",
        "seconds_allowed": seconds,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "command": f"python -m bench.plans.placement --seconds {seconds:g}",
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "problems": [asdict(result) for result in results],
    }


if __name__ == "__main__":
    sys.exit(main())
