"""What benches of the catalog's rows share: arguments, checked before any work, and reports that can be resumed."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seqpar.commands.arguments import Parser
from seqpar.layers.catalog import CATALOG, find
from seqpar.layers.entry import Entry


def file(text: str) -> Path:
    """A file in a folder that is there."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def picture(text: str) -> Path:
    """The same, of a kind that can be drawn."""
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .svg or .png, got {text!r}")
    return file(text)


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that all of them have."""
    parser = Parser(prog=f"python -m {name}", description=(doc or "").splitlines()[0])
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="rows of the catalog (default: all that fit)")
    parser.add_argument("--out", type=file, metavar="FILE", help="write JSON there")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw it: .svg or .png")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has already")
    return parser


def rows_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[Entry]:
    """The rows asked for, those left out of which nothing works yet; ends with one line if one is unknown."""
    if arguments.resume and not arguments.out:
        parser.error("--resume needs the --out that it goes on with")
    try:
        rows = [find(name) for name in arguments.layers or CATALOG]
    except ValueError as error:
        parser.error(str(error))
    return [row for row in rows if row.status == "works"]


def report_of(name: str, arguments: argparse.Namespace, new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the command and the machine; or the report that --resume goes on with."""
    if arguments.resume and arguments.out.exists():
        return json.loads(arguments.out.read_text())
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return {"command": " ".join([f"python -m {name}", *sys.argv[1:]]), "machine": machine, **new}


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def panels(names: Sequence[str]) -> tuple[Any, Any, Any]:
    """A figure of two panels side by side, in which each name has a line of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.27 * len(names) + 1.4), sharey=True)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    return figure, left, right


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
