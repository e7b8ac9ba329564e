"""What :func:`seqpar.verify` found: rows, and a table of them."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group as Renderables
    from rich.table import Table

GRADIENT = "gradient of "
_WIDEST = 28  # a parameter's name, before it is folded where the terminal is narrow
_SHOWN = 3  # gradients that are named when all is well


@dataclass(frozen=True)
class Row:
    """One comparison: ``ok`` if ``value`` is at most ``tolerance`` on every rank.

    ``value`` is the worst of all ranks: a relative norm of a difference, or a count of things that differ.
    """

    name: str
    guards_against: str
    value: float
    tolerance: float
    ok: bool
    detail: str = ""
    number: float = 0.0
    """What the row measured beside the difference: a ratio, a place."""

    @property
    def is_count(self) -> bool:
        """Whether ``value`` counts things of which there must be none."""
        return self.tolerance == 0

    def __str__(self) -> str:
        why = f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {_number(self)}, allowed {_allowed(self)}{why}"


@dataclass(frozen=True)
class FirstModule:
    """The first module, in the order in which calls end, whose output differs; ``after``: the last before it that is
    equal ("" if there is none). Where its input differs already, the cause is what stands between the two."""

    name: str
    kind: str
    value: float
    input_differs: bool
    after: str

    def __str__(self) -> str:
        already = "; what goes into it differs already" if self.input_differs else ""
        after = f", after {self.after}, which is equal" if self.after else ""
        return f"{self.name} ({self.kind}), by {self.value:.1e}{after}{already}"


@dataclass(frozen=True)
class Modules:
    """A forward pass module by module: how many calls could be compared, and the first that differs."""

    num_compared: int
    first: FirstModule | None


@dataclass(frozen=True)
class Report:
    """Whether a cut model is the model of one device; the same on every rank. Print it to see a table."""

    rows: tuple[Row, ...]
    ranks: int
    layout: str
    transport: str
    scan: str
    precision: str
    num_tokens: int
    num_documents: int
    modules: Modules | None = None
    """Where a row failed: which module differs first."""
    cause: str = ""
    """What differs first, in one line; "" where all is well."""

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that are not ok."""
        return tuple(row for row in self.rows if not row.ok)

    def require(self) -> None:
        """Raise ``ValueError`` naming the worst rows, unless all are ok."""
        if self.ok:
            return
        shown = sorted(self.failed, key=lambda row: (row.name.startswith(GRADIENT), -row.value))[:4]
        more = f"; and {len(self.failed) - len(shown)} more" if len(self.failed) > len(shown) else ""
        where = f" ({found})" if (found := self.where) else ""
        first = f"{self.cause}; " if self.cause else ""
        raise ValueError(
            f"{self.setting}: not the numbers of one device: {first}{'; '.join(map(str, shown))}{more}{where}"
        )

    @property
    def where(self) -> str:
        """Which module differs first, in words; empty where all is well or nothing could be compared."""
        if self.ok or self.modules is None or not self.modules.num_compared:
            return ""
        if self.modules.first is not None:
            return f"first module that differs: {self.modules.first}"
        count = self.modules.num_compared
        return (
            f"no module differs in a forward pass, of {count} compared: look at what the rows that failed guard against"
        )

    @property
    def setting(self) -> str:
        """How the model was cut, in words."""
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"{ranks}, {self.layout} layout, {self.transport} transport, {self.scan} scan"

    def as_json(self) -> dict[str, Any]:
        """Plain values; JSON has no infinity, so a difference without bound is the text ``"inf"``."""
        found = asdict(self)
        first = found["modules"] and found["modules"]["first"]
        for each in [*found["rows"], *filter(None, [first])]:
            each["value"] = each["value"] if math.isfinite(each["value"]) else "inf"
            each.pop("number", None)  # what a cause is told from: it may be no number at all
        return {"ok": self.ok} | found

    def __rich__(self) -> "Renderables":
        return _render(self)

    def __str__(self) -> str:
        from rich.console import Console

        page = io.StringIO()
        Console(file=page, width=120, no_color=True).print(self)
        return page.getvalue().rstrip()


def _render(report: Report) -> "Renderables":
    from rich.console import Group

    table = _new_table("compared", "difference", "allowed", "", "guards against")
    longest = max(len(row.name.removeprefix(GRADIENT)) for row in report.rows)
    table.columns[0].no_wrap = longest <= _WIDEST
    for row in (row for row in report.rows if not _is_gradient(row)):
        _add(table, row.name, row)
    table.add_section()
    gradients = [row for row in report.rows if _is_gradient(row)]
    failed = [row for row in gradients if not row.ok]
    shown = failed or sorted(gradients, key=lambda row: -row.value)[:_SHOWN]
    table.add_row(f"gradients, {'differing' if failed else 'the worst'} of {len(gradients)}:")
    for row in shown:
        _add(table, f"  {row.name.removeprefix(GRADIENT)}", row)
    from rich.markup import escape

    first = [f"[bold red]Not equal[/]: {escape(report.cause)}."] if report.cause else []
    setting = f"[bold]{report.setting}[/]; in {report.precision}"
    return Group(*first, setting, table, _verdict(report, len(gradients)))


def _new_table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        number = column in ("difference", "allowed", "worst")
        table.add_column(column, justify="right" if number else "left", no_wrap=number or not column, overflow="fold")
    return table


def _is_gradient(row: Row) -> bool:
    return row.name.startswith(GRADIENT)


def _add(table: "Table", name: str, row: Row) -> None:
    detail = f"[red]{row.detail}[/]\n" if row.detail and not row.ok else ""
    table.add_row(name, _number(row), _allowed(row), _mark(row.ok), f"{detail}[dim]{row.guards_against}[/]")


def _mark(ok: bool) -> str:
    return "[green]equal[/]" if ok else "[bold red]DIFFERS[/]"


def _verdict(report: Report, num_gradients: int) -> str:
    from rich.markup import escape

    batch = f"{report.num_tokens} tokens in rows of {report.num_documents} documents"
    if report.ok:
        return f"[bold green]Equal[/]: loss, logits and the gradients of all {num_gradients} parameters; {batch}."
    where = f"\n[bold]{escape(report.where[:1].upper() + report.where[1:])}.[/]" if report.where else ""
    return f"[bold red]Not equal[/]: {len(report.failed)} of {len(report.rows)} comparisons failed; {batch}.{where}"


def overview(reports: Sequence[Report]) -> "Renderables":
    """A table of many reports, a row each."""
    from rich.console import Group

    table = _new_table("layout", "transport", "scan", "worst", "", "what differs")
    for report in reports:
        # Counts of things that differ are no differences of numbers.
        worst = max((row.value for row in report.rows if not row.is_count), default=0.0)
        names = [row.name for row in report.failed]
        what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        if report.modules is not None and report.modules.first is not None:
            what += f"; first module: {report.modules.first.name}"
        table.add_row(report.layout, report.transport, report.scan, f"{worst:.1e}", _mark(report.ok), what)
    bad = sum(not report.ok for report in reports)
    verdict = f"[bold red]{bad} of {len(reports)} ways of cutting differ[/]" if bad else (
        f"[bold green]Equal[/] in all {len(reports)} ways of cutting"
    )  # fmt: skip
    return Group(table, f"{verdict}: {reports[0].ranks} ranks, in {reports[0].precision}.")


def _number(row: Row) -> str:
    return f"{row.value:g}" if row.is_count else f"{row.value:.1e}"


def _allowed(row: Row) -> str:
    return "none" if row.is_count else f"{row.tolerance:.0e}"
