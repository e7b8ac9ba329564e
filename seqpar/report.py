"""What :func:`seqpar.verify` found: rows, and a table of them."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group as Renderables

GRADIENT = "gradient of "
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

    @property
    def is_count(self) -> bool:
        """Whether ``value`` counts things of which there must be none."""
        return self.tolerance == 0

    def __str__(self) -> str:
        why = f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {_number(self)}, allowed {_allowed(self)}{why}"


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
        raise ValueError(f"{self.setting}: not the numbers of one device: {'; '.join(map(str, shown))}{more}")

    @property
    def setting(self) -> str:
        """How the model was cut, in words."""
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''}"
        return f"{ranks}, {self.layout} layout, {self.transport} transport, {self.scan} scan"

    def __rich__(self) -> "Renderables":
        return _render(self)

    def __str__(self) -> str:
        from rich.console import Console

        page = io.StringIO()
        Console(file=page, width=120, no_color=True).print(self)
        return page.getvalue().rstrip()


def _render(report: Report) -> "Renderables":
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    table.title = f"{report.setting}  against one device, in {report.precision}"
    table.add_column("compared", overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("allowed", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("guards against", style="dim", overflow="fold")
    for row in _shown(report.rows):
        mark = "[green]equal[/]" if row.ok else "[bold red]DIFFERS[/]"
        detail = "" if row.ok or not row.detail else f"\n[red]{row.detail}[/]"
        table.add_row(f"{row.name}", _number(row), _allowed(row), mark, f"{row.guards_against}{detail}")
    return Group(table, _verdict(report))


def _shown(rows: Iterable[Row]) -> list[Row]:
    """All rows that fail and all that are no parameter's gradient; of the other gradients the worst few."""
    plain = [row for row in rows if not row.name.startswith(GRADIENT)]
    gradients = sorted((row for row in rows if row.name.startswith(GRADIENT)), key=lambda row: -row.value)
    failed = [row for row in gradients if not row.ok]
    return plain + (failed or gradients[:_SHOWN])


def _verdict(report: Report) -> str:
    gradients = sum(row.name.startswith(GRADIENT) for row in report.rows)
    batch = f"{report.num_tokens} tokens in {report.num_documents} document{'s' if report.num_documents != 1 else ''}"
    if report.ok:
        return f"[bold green]Equal[/]: loss, logits and the gradients of all {gradients} parameters, on {batch}."
    return f"[bold red]Not equal[/]: {len(report.failed)} of {len(report.rows)} comparisons failed, on {batch}."


def _number(row: Row) -> str:
    return f"{row.value:g}" if row.is_count else f"{row.value:.1e}"


def _allowed(row: Row) -> str:
    return "none" if row.is_count else f"{row.tolerance:.0e}"
