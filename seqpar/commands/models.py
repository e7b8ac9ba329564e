"""``seqpar models``: which models of transformers train with their sequence cut, and what was measured.

Exit status: 0, or 2 for input that cannot be used.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from seqpar.commands.arguments import did_you_mean

if TYPE_CHECKING:
    from seqpar.hf.measured import Row

DESCRIPTION = (
    "List the model_types of transformers that sequence_parallel was measured with: each shrunk to a few layers of "
    "every kind, in float64, cut over 1 to 4 ranks, against transformers itself on each document alone. What is not "
    "exact is refused when it is wrapped."
)
WIDTH = 100
_COLUMNS = ("model_type", "in_place", "converted", "error", "why")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar models``; ``parser.set_defaults(run=run)`` is set as well."""
    parser.add_argument("names", nargs="*", metavar="model_type", help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """List; raises ``ValueError`` for a ``model_type`` that was not measured."""
    rows = chosen(arguments.names)
    if arguments.json:
        print(json.dumps([as_json(row) for row in rows], indent=2))
    elif arguments.markdown:
        print(markdown(rows))
    else:
        print(table(rows))
    return 0


def chosen(names: Sequence[str]) -> "list[Row]":
    """The rows of ``names``, or all."""
    from seqpar.hf.measured import measured

    known = measured()
    for name in names:
        if name not in known:
            raise ValueError(f"model_type {name!r} was not measured{did_you_mean(name, known)}")
    return [known[name] for name in names or known]


def as_json(row: "Row") -> dict[str, Any]:
    """One row."""
    found = asdict(row)
    return {name: found[name] for name in _COLUMNS}


def markdown(rows: "Sequence[Row]") -> str:
    """The table of docs/models.md."""
    lines = ["| model_type | in place | error | why not |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| `{row.model_type}` | {row.in_place} | {_error(row)} | {row.why.replace('|', '/')} |")
    return "\n".join(lines)


def table(rows: "Sequence[Row]") -> str:
    """A line for each, of at most ``WIDTH`` columns, and how many there are."""
    lines = [f"{'model_type':<28}{'in place':<10}{'error':<9}why not"]
    lines += [_line(row) for row in rows]
    exact = sum(row.in_place == "exact" for row in rows)
    return "\n".join([*lines, f"\n{exact} of {len(rows)} exact; all words: --json"])


def _line(row: "Row") -> str:
    line = f"{row.model_type:<28}{row.in_place:<10}{_error(row):<9}{row.why}".rstrip()
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _error(row: "Row") -> str:
    return "" if row.error is None else f"{row.error:.0e}"
