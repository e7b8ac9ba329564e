"""`python -m bench.plans.planning`: how good plans are, how close to the bound, how long planning takes, on one core.

A row for each case, and what must show against what was measured. Writes JSON, and a picture with --plot. Steps are
predicted by the cost model: nothing here was timed on a GPU.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from bench.plans.planning_cases import QUICK, Case, Size, sections
from bench.plans.planning_plot import draw
from bench.plans.planning_result import Result
from seqpar.planner import Options, Plan, check, plan_batch

WIKIPEDIA = Path(__file__).parents[1] / "data" / "wikipedia_lengths.txt"
MANY = 100  # a section of more cases than this is one row of the table
KEPT = 20  # of its cases, those that gain least over the best static plan


def measure(case: Case) -> Result:
    """Plan one case and check the plan."""
    wall, core = time.perf_counter(), time.process_time()
    plan = plan_batch(case.problem, Options(seconds=case.seconds))
    wall, core = time.perf_counter() - wall, time.process_time() - core
    check(case.problem, plan)
    named = {row.name: row for row in plan.baselines if row.name != "degree"}
    of_degree = [row for row in plan.baselines if row.name == "degree" and row.degree == case.static_degree]
    static, best = min(of_degree, key=lambda row: row.seconds, default=named["static"]), named["best_static"]
    return Result(
        case.section, case.name, plan.model, plan.devices, plan.num_documents, plan.num_tokens, shapes(plan),
        plan.step_seconds, static.degree, static.seconds, best.degree, best.seconds, plan.lower_bound_seconds, plan.gap,
        plan.active_bound, plan.stage, plan.stopped_by, wall, core,
    )  # fmt: skip


def shapes(plan: Plan) -> str:
    """The degrees of each micro-batch as papers write them: <32, 8x4>."""
    return " ".join(_shape([group.degree for group in batch.groups]) for batch in plan.micro_batches)


def _shape(degrees: list[int]) -> str:
    counts = {degree: degrees.count(degree) for degree in sorted(set(degrees), reverse=True)}
    return "<" + ", ".join(f"{degree}x{count}" if count > 1 else f"{degree}" for degree, count in counts.items()) + ">"


@dataclass(frozen=True)
class Target:
    """What must show: a figure of some sections, and what it must be at least or at most."""

    sections: str
    what: str
    figure: Callable[[list[Result]], float]
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit - 1e-9 if self.at_least else value <= self.limit + 1e-9


def _speed_up(results: list[Result]) -> float:
    """Of all steps together."""
    return sum(r.static_seconds for r in results) / sum(r.step_seconds for r in results)


def _mean_speed_up(results: list[Result]) -> float:
    return fmean(r.speed_up for r in results)


def _worst_gap(results: list[Result]) -> float:
    return max(r.gap for r in results)


def _mean_gap(results: list[Result]) -> float:
    return fmean(r.gap for r in results)


def _slowest(results: list[Result]) -> float:
    return max(max(r.wall_seconds, r.core_seconds) for r in results)


TARGETS = (
    Target("published", "planned step, ms", lambda rs: round(rs[0].step_seconds * 1e3, 1), 3858.9),
    Target("published", "<32x2> over it", lambda rs: round(rs[0].speed_up, 3), 1.298, True),
    *(Target(name, "worst gap", _worst_gap, 0.0) for name in ("published", "small", "tight")),
    *(Target(name, "slowest planning, s", _slowest, 3.0) for name in ("published", "small", "tight")),
    *(Target(name, f"speed-up over static 64, {of}", figure, least, True)
      for name, least in (("wikipedia", 1.8), ("commoncrawl", 1.5), ("github", 1.37))
      for of, figure in (("mean of batches", _mean_speed_up), ("all steps together", _speed_up))),
    *(Target(name, f"{kind} gap", figure, most) for name, most in (("wikipedia", 0.08), ("commoncrawl", 0.13),
      ("github", 0.13)) for kind, figure in (("mean", _mean_gap), ("worst", _worst_gap))),
    *(Target(name, "slowest planning, s", _slowest, 1.0) for name in ("wikipedia", "commoncrawl", "github")),
    Target("random", "worst of best static / planned", lambda rs: min(r.over_best_static for r in rs), 1.0, True),
    Target("large", "slowest planning, s", _slowest, 10.0),
)  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.plans.planning", description="Measure plans and bounds.")
    parser.add_argument("--wikipedia", type=Path, default=WIKIPEDIA, metavar="FILE", help=f"lengths ({WIKIPEDIA.name})")
    parser.add_argument("--only", default=",".join(sections()), help="sections, with commas between (all)")
    parser.add_argument("--quick", action="store_true", help="few batches and small clusters: does it run?")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results to this JSON file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them into this SVG or PNG file")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - set(sections())
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; known are {', '.join(sections())}")
    if not options.wikipedia.is_file() and set(options.only.split(",")) & {"wikipedia", "large"}:
        parser.error(f"no file {options.wikipedia}: name one of document lengths with --wikipedia, or leave the "
                     "sections wikipedia and large out with --only")  # fmt: skip
    return options


def run(names: Sequence[str], size: Size, wikipedia: Path, say: Callable[[str], None]) -> list[Result]:
    """All cases of these sections."""
    results = []
    for name in names:
        for case in sections()[name](size, wikipedia):
            result = measure(case)
            results.append(result)
            say(f"{len(results)}  {name}: {case.name}  gap {result.gap:.1%}, {result.wall_seconds:.2f} s")
    return results


def table(results: list[Result]) -> Table:
    shown = Table(title="Planned steps, predicted by the cost model", title_justify="left")
    shown.add_column("batch", no_wrap=True)
    for column in ("documents", "devices", "planned s", "static s", "best static s", "speed-up", "bound s", "gap",
                   "planning s"):  # fmt: skip
        shown.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys(result.section for result in results):
        mine = [result for result in results if result.section == name]
        for result in mine if len(mine) <= MANY else ():
            shown.add_row(f"{name}: {result.name}", *_cells([result]))
        if len(mine) > 1:
            shown.add_row(f"[bold]{name}: mean of {len(mine)}", *_cells(mine))
        shown.add_section()
    return shown


def _cells(results: list[Result]) -> list[str]:
    static = fmean(r.static_seconds for r in results)
    degrees = {r.static_degree for r in results}
    of_degree = f" <{degrees.pop()}>" if len(degrees) == 1 else ""
    return [
        f"{fmean(r.documents for r in results):,.0f}",
        f"{fmean(r.devices for r in results):,.0f}",
        f"{fmean(r.step_seconds for r in results):.3f}",
        f"{static:.3f}{of_degree}",
        f"{fmean(r.best_static_seconds for r in results):.3f}",
        f"{_speed_up(results):.2f}",
        f"{fmean(r.lower_bound_seconds for r in results):.3f}",
        f"{_mean_gap(results):.1%}",
        f"{fmean(r.wall_seconds for r in results):.2f}",
    ]


def judged(results: list[Result]) -> list[dict[str, object]]:
    """Each target with what was measured."""
    rows: list[dict[str, object]] = []
    for target in TARGETS:
        mine = [result for result in results if result.section == target.sections]
        if mine:
            value = target.figure(mine)
            rows.append({"section": target.sections, "what": target.what, "measured": round(value, 5),
                         "wanted": f"{'>=' if target.at_least else '<='} {target.limit:g}",
                         "met": target.met(value)})  # fmt: skip
    return rows


def targets(rows: list[dict[str, object]]) -> Table:
    shown = Table("section", "what must show", "wanted", "measured", "met", title="Targets", title_justify="left")
    for row in rows:
        shown.add_row(
            *(str(row[key]) for key in ("section", "what", "wanted", "measured")), "yes" if row["met"] else "no"
        )
    return shown


def as_json(results: list[Result], arguments: Sequence[str]) -> str:
    """The results, with the command and the machine that made them."""
    packages = {name: _version(name) for name in ("numpy", "pulp", "highspy")}
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **packages,
    }
    content = {"command": shlex.join(["python", "-m", "bench.plans.planning", *arguments]), "machine": machine,
               "targets": judged(results)}  # fmt: skip
    lines = ",\n".join("  " + json.dumps(_row(result)) for result in _kept(results))
    return json.dumps(content, indent=1)[:-2] + f',\n "results": [\n{lines}\n ]\n}}'


def _kept(results: list[Result]) -> list[Result]:
    """All, but of a section with many only those that gain least."""
    kept: list[Result] = []
    for name in dict.fromkeys(result.section for result in results):
        mine = [result for result in results if result.section == name]
        kept.extend(mine if len(mine) <= MANY else sorted(mine, key=lambda r: r.over_best_static)[:KEPT])
    return kept


def _row(result: Result) -> dict[str, object]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(result).items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    for path in (options.out, options.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    size = QUICK if options.quick else Size()
    results = run(
        options.only.split(","), size, options.wikipedia, lambda line: print(line, file=sys.stderr, flush=True)
    )
    console = Console(width=160)
    console.print(table(results))
    console.print(targets(judged(results)))
    if options.out:
        options.out.write_text(as_json(results, arguments) + "\n")
    if options.plot:
        draw(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
