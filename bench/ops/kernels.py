"""Proof of kernels without a GPU: `python -m bench.ops.kernels [--arch sm_90] [--op softmax_block] [--out FILE]`.

Every kernel of every op is compiled for each architecture with the arguments that it would be started with, and the
binary is read: no spills, matrix instructions for every 16-bit product, shared memory within the limit. Exit status:
0 all hold, 1 some do not.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table

from bench import readme
from bench.ops.kernels_cases import BUILDERS, Case, cases
from bench.ops.kernels_compile import Binary, examined
from bench.ops.kernels_record import TARGETS, Job, jobs


def collect(found: Sequence[Case], architectures: Sequence[str]) -> list[tuple[str, Job]]:
    """Every distinct binary with the op it belongs to; a binary that several cases share is named after the first."""
    seen: dict[str, tuple[str, Job]] = {}
    for case in found:
        for architecture in architectures:
            for job in jobs(case.name, case.run, architecture):
                seen.setdefault(job.key, (case.op, job))
    return list(seen.values())


def table_of(found: list[tuple[str, Job]], processes: int) -> Iterator[tuple[str, Binary]]:
    """Compile all, some at a time; the children of a fork already have the kernels."""
    if processes == 1:
        yield from ((op, examined(job)) for op, job in found)
        return
    with multiprocessing.get_context("fork").Pool(processes, _begin, (found,)) as pool:
        for index, binary in pool.imap(_compile, range(len(found))):
            yield found[index][0], binary


def _begin(found: list[tuple[str, Job]]) -> None:
    _compile.found = found  # type: ignore[attr-defined]


def _compile(index: int) -> tuple[int, Binary]:
    return index, examined(_compile.found[index][1])  # type: ignore[attr-defined]


def row_of(op: str, binary: Binary) -> dict[str, Any]:
    return {"op": op, **asdict(binary), "faults": binary.faults()}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table; what is at fault in red."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("op", "kernel", "case", "for"):
        table.add_column(head)
    for head in ("warps", "regs", "spill", "shared", "matrix", "wgmma"):
        table.add_column(head, justify="right")
    names = ("op", "kernel", "case", "architecture", "warps", "registers", "spill_bytes", "shared_bytes",
             "matrix_instructions", "warp_group_instructions")  # fmt: skip
    for row in rows:
        table.add_row(*(str(row[name]) for name in names), style="red" if row["faults"] else "")
    Console(width=150).print(table)
    for row in rows:
        if row["faults"]:
            print(f"{row['kernel']} ({row['case']}, {row['architecture']}): {'; '.join(row['faults'])}")


def work_of(found: Sequence[Case]) -> list[dict[str, Any]]:
    """What each case must move and multiply, and the least time that takes on an H100 SXM."""
    return [
        {"op": case.op, "case": case.name, **asdict(case.work), "forward_seconds": case.work.seconds(),
         "both_seconds": case.work.seconds(backward=True)}
        for case in found
    ]  # fmt: skip


def as_json(rows: list[dict[str, Any]], work: list[dict[str, Any]]) -> str:
    """Tables as their columns' names, and a line of JSON for each row."""
    parts = [f'"torch": "{torch.__version__}"', f'"triton": "{triton.__version__}"']
    for name, table in (("kernels", rows), ("work", work)):
        columns = json.dumps(list(table[0]) if table else [])
        lines = ",\n".join(json.dumps(list(row.values())) for row in table)
        parts.append(f'"{name}": {{"columns": {columns}, "rows": [\n{lines}\n]}}')
    return "{" + ",\n".join(parts) + "}\n"


def from_json(text: str, name: str = "kernels") -> list[dict[str, Any]]:
    """The rows of one of the tables."""
    table = json.loads(text)[name]
    return [dict(zip(table["columns"], row)) for row in table["rows"]]


def markdown(rows: list[dict[str, Any]]) -> str:
    """What ``bench/README.md`` shows: a line for each op and architecture."""
    lines = []
    for op, architecture in sorted({(row["op"], row["architecture"]) for row in rows}):
        mine = [row for row in rows if (row["op"], row["architecture"]) == (op, architecture)]
        counts = (sum(bool(row[name]) for row in mine) for name in ("matrix_instructions", "warp_group_instructions"))
        spills, most = sum(row["spill_bytes"] > 0 for row in mine), max(row["registers"] for row in mine)
        faults = sum(bool(row["faults"]) for row in mine)
        lines.append((op, architecture, len(mine), most, spills, *counts, faults))
    heads = (
        "op",
        "for",
        "binaries",
        "most registers",
        "that spill",
        "with matrix instructions",
        "with wgmma",
        "at fault",
    )
    return f"torch {torch.__version__}, triton {triton.__version__}.\n\n{readme.table(heads, lines)}"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.ops.kernels", description=__doc__)
    result.add_argument("--arch", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    result.add_argument("--op", action="append", choices=list(BUILDERS), help="only this op; may be repeated")
    result.add_argument("--case", default="", help="only cases whose name contains this")
    result.add_argument("--quick", action="store_true", help="only the cases that stand for all")
    result.add_argument("--processes", type=int, default=2)
    result.add_argument("--out", type=Path, help="write JSON here")
    result.add_argument("--readme", type=Path, help="put a summary into this file")
    return result


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    found = [
        case
        for case in cases()
        if case.op in (options.op or BUILDERS) and options.case in case.name and (case.quick or not options.quick)
    ]
    begin = time.perf_counter()
    wanted = collect(found, options.arch or list(TARGETS))
    rows = []
    for op, binary in table_of(wanted, options.processes):
        rows.append(row_of(op, binary))
        if sys.stderr.isatty():
            where = f"{binary.kernel} {binary.case} {binary.architecture}"
            print(f"\r{len(rows)}/{len(wanted)} {where}", end="\033[K", file=sys.stderr, flush=True)
    print(f"\r{len(rows)} kernels in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    show(rows)
    if options.out:
        options.out.write_text(as_json(rows, work_of(found)))
    if options.readme:
        readme.put(options.readme, "kernels", markdown(rows))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
