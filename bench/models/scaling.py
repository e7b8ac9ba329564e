"""`torchrun --standalone --nproc-per-node 4 -m bench`: step time and tokens/s for 1, 2 and 4 ranks, in one run.

Two tables: the same total (does cutting make a step faster?) and the same tokens per rank (does a longer sequence cost
only its share?), for every scan and transport, beside the one-rank step. Writes JSON, and a picture with --plot.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.models.cases import Sizes, cases
from bench.models.measure import Result, run_rounds
from seqpar.collectives import connect, disconnect


def parse(arguments: list[str]) -> argparse.Namespace:
    sizes = Sizes()
    parser = argparse.ArgumentParser(prog="bench", description="Time training steps, cut and whole, in one run.")
    parser.add_argument("--tokens", type=int, default=sizes.tokens, help="tokens of the whole sequence (16384)")
    parser.add_argument("--dim", type=int, default=sizes.dim, help="dim of the linear model (256)")
    parser.add_argument("--layers", type=int, default=sizes.layers, help="layers of the linear model (2)")
    parser.add_argument("--softmax-dim", type=int, default=sizes.softmax_dim, help="of the softmax model (128)")
    parser.add_argument("--softmax-layers", type=int, default=sizes.softmax_layers, help="of the softmax model (1)")
    parser.add_argument("--mixers", default="linear,softmax", help="which models: linear,softmax")
    parser.add_argument("--ranks", default="2,4", help="rank counts beside 1, at most the ranks that run (2,4)")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds over all cases (4)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank (1)")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the scaling to this SVG or PNG file")
    return parser.parse_args(arguments)


def base_of(result: Result, results: list[Result]) -> Result:
    """The one-rank step that a result is compared with."""
    case = result.case
    return next(r for r in results if (r.case.mixer, r.case.scaling, r.case.ranks) == (case.mixer, case.scaling, 1))


def table(results: list[Result], scaling: str, title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in ("model", "scan or transport", "layout"):
        shown.add_column(column)
    for column in ("ranks", "tokens", "step s", "tokens/s", "time / 1 rank", "MB sent by rank 0"):
        shown.add_column(column, justify="right")
    for result in (r for r in results if r.case.scaling == scaling):
        case = result.case
        shown.add_row(
            case.mixer,
            case.way if case.ranks > 1 else "-",
            case.layout if case.ranks > 1 else "-",
            str(case.ranks),
            f"{case.tokens:,}",
            f"{result.median_seconds:.3f}",
            f"{case.tokens / result.median_seconds:,.0f}",
            f"{result.ratio(base_of(result, results)):.3f}",
            f"{result.bytes_ / 1e6:.2f}",
            end_section=case.ranks == 1,
        )
    return shown


def as_json(results: list[Result], options: argparse.Namespace) -> str:
    """The results, with the command and the machine that made them."""
    rows = [
        {
            **asdict(r.case),
            "seconds": [round(s, 4) for s in r.seconds],
            "median_seconds": round(r.median_seconds, 4),
            "tokens_per_second": round(r.case.tokens / r.median_seconds),
            "time_over_one_rank": round(r.ratio(base_of(r, results)), 4),
            "bytes_sent_by_rank_0": r.bytes_,
        }
        for r in results
    ]
    machine = {"processor": platform.machine(), "cores": torch.get_num_interop_threads(), "torch": torch.__version__}
    command = "torchrun --standalone --nproc-per-node 4 -m bench " + " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items() if value is not None
    )
    return json.dumps({"command": command, "machine": machine, "results": rows}, indent=1)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    group = connect("gloo")
    counts = [count for count in map(int, options.ranks.split(",")) if count <= group.size]
    sizes = Sizes(options.tokens, options.dim, options.layers, options.softmax_dim, options.softmax_layers)
    found = cases(sizes, options.mixers.split(","), counts)
    console = Console(width=120)

    def say(line: str) -> None:
        if group.rank == 0:
            print(f"\r{line:100}", end="", file=sys.stderr, flush=True)

    results = run_rounds(found, sizes, group, options.rounds, getattr(torch, options.dtype), say)
    disconnect()
    if group.rank > 0:
        return 0
    print(file=sys.stderr)
    console.print(table(results, "total", "The same sequence on more ranks"))
    console.print(table(results, "per_rank", "The same tokens per rank, a longer sequence"))
    if options.out:
        options.out.write_text(as_json(results, options) + "\n")
    if options.plot:
        from bench.models.plot import draw

        draw(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
