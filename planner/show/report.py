"""A plan as a table: placement at a glance, and above it how good the plan is."""

import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from seqpar.planner.plan import Baseline, Plan, PlannedGroup, PlannedMicroBatch

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_GIB = 2**30
_BAR = 14
_FOLDED = 4  # groups alike in degree and transport beyond which a micro-batch shows them in one row
WIDTH = 128  # of the table with its bars; below it they are left out
COLOURS = {"fixed": "grey50", "compute": "dodger_blue2", "communication": "orange1", "idle": "grey23"}


def shape(plan: Plan) -> str:
    """The degrees of all micro-batches in short: ``<32, 8x4> <8x8>x2 <1x64>``."""
    counted = [(text, len(list(same))) for text, same in groupby(_shape(batch.groups) for batch in plan.micro_batches)]
    return " ".join(f"{text}x{count}" if count > 1 else text for text, count in counted)


def text(plan: Plan, *, compare: bool = False, full: bool = False) -> str:
    """The table as plain text."""
    from rich.console import Console

    page = io.StringIO()
    Console(file=page, width=WIDTH).print(render(plan, compare=compare, full=full))
    return page.getvalue()


def render(plan: Plan, *, compare: bool = False, full: bool = False, bars: bool = True) -> "RenderableType":
    """What rich prints: a header, and a row a group, where many groups alike share one unless ``full``.

    ``compare`` adds the plans with one degree for all; ``bars`` need a wide page.
    """
    from rich.console import Group

    parts: list[RenderableType] = [_header(plan), _placement(plan, full, bars), *([_legend()] if bars else [])]
    if compare:
        parts.append(_comparison(plan))
    return Group(*parts)


def _shape(groups: Sequence[PlannedGroup]) -> str:
    degrees = sorted((group.degree for group in groups), reverse=True)
    counted = [(degree, len(list(same))) for degree, same in groupby(degrees)]
    return "<" + ", ".join(f"{degree}x{count}" if count > 1 else str(degree) for degree, count in counted) + ">"


def _header(plan: Plan) -> "RenderableType":
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    best = Text.assemble((f"{plan.step_seconds:,.4g} s", "bold"), "   ", _gap(plan))
    grid.add_row("step", best)
    grid.add_row("bound", Text(f"{plan.lower_bound_seconds:,.4g} s   {plan.active_bound}"))
    for name, label in (("static", "static"), ("best_static", "best static")):
        found = [baseline for baseline in plan.baselines if baseline.name == name]
        if found:
            grid.add_row(label, _baseline(plan, found[0]))
    count = len(plan.micro_batches)
    grid.add_row("shape", f"{shape(plan)}   {count} micro-batch{'es' if count > 1 else ''}")
    grid.add_row("found by", Text(_found_by(plan)))
    if plan.note:
        grid.add_row("note", Text(plan.note))
    title = f"{plan.num_documents:,} document{'s' if plan.num_documents > 1 else ''}, {plan.num_tokens:,} tokens"
    head = Text.assemble((title, "bold"), f" · {plan.model} on {plan.cluster}")
    return Panel(grid, title=head, title_align="left", expand=False)


def _gap(plan: Plan) -> "Text":
    from rich.text import Text

    if plan.gap == 0:
        return Text("proven optimal", style="bold green")
    return Text(f"at most {plan.gap:.1%} above the best there can be", style="green" if plan.gap < 0.1 else "yellow")


def _baseline(plan: Plan, baseline: Baseline) -> str:
    groups = plan.devices // baseline.degree
    shape = f"<{baseline.degree}x{groups}>" if groups > 1 else f"<{baseline.degree}>"
    count = baseline.num_micro_batches
    batches = f"{count} micro-batch{'es' if count > 1 else ''}"
    faster = baseline.seconds / plan.step_seconds
    return f"{baseline.seconds:,.4g} s   {shape} in {batches}; the plan is {faster:.2f}x as fast"


def _found_by(plan: Plan) -> str:
    spent = f" in {plan.planning_seconds:.2f} s" if plan.planning_seconds else ""
    late = "; the deadline cut planning short" if plan.stopped_by == "deadline" else ""
    return f"{plan.stage}{spent}, seed {plan.seed}{late}"


def _placement(plan: Plan, full: bool, bars: bool) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), collapse_padding=True, header_style="bold")
    memory = f"memory GiB\nof {plan.memory_budget_bytes / _GIB:.3g}"
    for name in ("ranks", "degree", "transport", "documents", f"tokens/dev.\nof {plan.capacity_tokens:,}", memory,
                 "compute\ns", "comm.\ns", "fixed\ns", "total\ns", "idle"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("ranks", "transport") else "right", no_wrap=True)
    if bars:
        table.add_column("time", no_wrap=True)
    for number, batch in enumerate(plan.micro_batches):
        for row in _micro_batch_rows(plan, batch, number, full):
            table.add_row(*row[: len(table.columns)])
        table.add_section()
    return table


def _micro_batch_rows(
    plan: Plan, batch: PlannedMicroBatch, number: int, full: bool
) -> "Iterator[list[RenderableType]]":
    yield [f"[bold]micro-batch {number}[/bold]", *[""] * 8, f"[bold]{batch.seconds:.3f}[/bold]",
           f"[bold]{_share(_idle(plan, batch))}[/bold]"]  # fmt: skip
    for alike in _folded(batch.groups, full):
        yield _row(plan, batch, alike)
    free = plan.devices - sum(group.degree for group in batch.groups)
    if free:
        ranks = set(range(plan.devices)).difference(*(group.ranks for group in batch.groups))
        yield [f"  [dim]{_runs(sorted(ranks))}[/dim]", "[dim]idle[/dim]", *[""] * 8, "100%", _bar(0, 0, 0, 1)]


def _folded(groups: Sequence[PlannedGroup], full: bool) -> Iterator[tuple[PlannedGroup, ...]]:
    """Groups one by one from large to small, or all of a kind together where there are many."""

    def kind(group: PlannedGroup) -> tuple[int, str]:
        return -group.degree, group.transport

    for _, same in groupby(sorted(groups, key=lambda group: (*kind(group), group.ranks)), key=kind):
        alike = tuple(same)
        if full or len(alike) <= _FOLDED:
            yield from ((group,) for group in alike)
        else:
            yield alike


def _row(plan: Plan, batch: PlannedMicroBatch, groups: Sequence[PlannedGroup]) -> "list[RenderableType]":
    count = len(groups)
    compute = sum(group.compute_seconds for group in groups) / count
    communication = sum(group.communication_seconds for group in groups) / count
    fixed = sum(group.fixed_seconds for group in groups) / count
    idle = batch.seconds - compute - communication - fixed
    fullest = max(groups, key=lambda group: group.tokens_per_device)
    many = f"{groups[0].degree} x{count}" if count > 1 else str(groups[0].degree)
    return [
        f"  {_runs(sorted(rank for group in groups for rank in group.ranks))}",
        many,
        groups[0].transport.replace("_", "-"),
        f"{sum(len(group.documents) for group in groups):,}",
        _full(fullest.tokens_per_device, plan.capacity_tokens, f"{fullest.tokens_per_device:,}"),
        _full(fullest.memory_bytes, plan.memory_budget_bytes, f"{fullest.memory_bytes / _GIB:.1f}"),
        f"{compute:.3f}",
        f"{communication:.3f}",
        f"{fixed:.3f}",
        f"{compute + communication + fixed:.3f}",
        _share(idle / batch.seconds),
        _bar(fixed, compute, communication, idle),
    ]


def _runs(ranks: Sequence[int]) -> str:
    """Ranks in order as runs, the first two of them."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words[:2]) + (", ..." if len(words) > 2 else "")


def _full(value: float, limit: float, words: str) -> "Text":
    from rich.text import Text

    return Text(words, style="yellow" if value > 0.95 * limit else "")


def _bar(fixed: float, compute: float, communication: float, idle: float) -> "Text":
    """A bar of the micro-batch's time; without colours the parts differ in their signs."""
    from rich.text import Text

    total = fixed + compute + communication + idle
    ends = [round(_BAR * part / total) for part in (fixed, fixed + compute, fixed + compute + communication)]
    widths = [ends[0], ends[1] - ends[0], ends[2] - ends[1], _BAR - ends[2]]
    return Text.assemble(*((sign * width, colour) for sign, width, colour in zip("▒█▓·", widths, COLOURS.values())))


def _idle(plan: Plan, batch: PlannedMicroBatch) -> float:
    busy = sum(group.seconds * group.degree for group in batch.groups)
    return 1 - busy / (batch.seconds * plan.devices)


def _share(value: float) -> str:
    """Percent; what rounding leaves below nothing is nothing."""
    return f"{max(0.0, value):.0%}"


def _legend() -> "Text":
    from rich.text import Text

    words = [(f" {sign * 2} {name}  ", colour) for sign, (name, colour) in zip("▒█▓·", COLOURS.items())]
    return Text.assemble(*words, ("rows of several groups: mean seconds, fullest device", "dim"))


def _comparison(plan: Plan) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title="against one degree for all",
                  title_justify="left")  # fmt: skip
    for name in ("groups", "transport", "micro-batches", "step s", "the plan is"):
        table.add_column(name, justify="left" if name in ("groups", "transport") else "right")
    best = min((row.seconds for row in plan.baselines), default=0.0)
    for row in plan.baselines:
        if row.name == "degree":
            style = "bold" if row.seconds == best else ""
            groups, faster = f"{plan.devices // row.degree} of {row.degree}", row.seconds / plan.step_seconds
            cells = (groups, row.transport.replace("_", "-"), str(row.num_micro_batches), f"{row.seconds:.3f}")
            table.add_row(*cells, f"{faster:.2f}x as fast", style=style)
    return table
