"""Swap plans as tables: every strategy beside the others, and what becomes of each saved tensor."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seqpar.offload.planning.plan import SwapPlan
from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.planning.swap_plan import Compared

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

WIDTH = 112
COLOURS = {"keep": "dodger_blue2", "swap": "orange1", "recompute": "grey50"}
_GIB = 2**30
_BAR = 24
_SIGNS = {"keep": "█", "swap": "▓", "recompute": "·"}
_LIMITS = {"d2h": "copies out", "h2d": "copies back", "host": "host memory", "device": "device memory"}


def text(compared: Sequence[Compared], chosen: str = "auto") -> str:
    """The tables as plain text."""
    from rich.console import Console

    page = io.StringIO()
    Console(file=page, width=WIDTH).print(render(compared, chosen))
    return page.getvalue()


def render(compared: Sequence[Compared], chosen: str = "auto") -> "RenderableType":
    """What rich prints: a row for each strategy, why some cannot be, and the fractions of the chosen one."""
    from rich.console import Group
    from rich.text import Text

    refused = [each for each in compared if each.plan is None]
    plans = [each.plan for each in compared if each.plan is not None and each.strategy == chosen]
    return Group(
        _strategies(compared, chosen),
        *(Text(f"{each.strategy}: {each.refused}", style="yellow") for each in refused),
        *(part for plan in plans for part in (_title(plan), _fractions(plan), _legend())),
    )


def _strategies(compared: Sequence[Compared], chosen: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("strategy", "device\nGiB", "host\nGiB", "recompute\ns", "exposed\ns", "step\ns", "to best",
                 "hides from\ntokens", "used up"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("strategy", "used up") else "right", no_wrap=True)
    best = min((each.plan.step_seconds for each in compared if each.plan is not None), default=0.0)
    for each in compared:
        style = "bold" if each.strategy == chosen else ""
        table.add_row(*_row(each, best), style=style)
    return table


def _row(compared: Compared, best: float) -> list[str]:
    plan = compared.plan
    if plan is None:
        return [compared.strategy, *["-"] * 7, "cannot be"]
    return [
        compared.strategy if plan.alpha is None else f"{compared.strategy} ({plan.alpha:.2f})",
        f"{plan.device_peak_bytes / _GIB:,.1f}",
        f"{plan.host_peak_bytes / _GIB:,.1f}",
        f"{plan.recompute_seconds:,.4g}",
        f"{plan.exposed_seconds:,.4g}",
        f"{plan.step_seconds:,.4g}",
        f"{plan.step_seconds / best:.3f}x",
        "never" if plan.hides_from_tokens is None else f"{plan.hides_from_tokens:,}",
        ", ".join(_LIMITS[name] for name in plan.binds),
    ]


def _title(plan: SwapPlan) -> "Text":
    from rich.text import Text

    words = f"{plan.layers} layers, {plan.tokens:,} tokens on this device of a sequence of {plan.context_tokens:,.0f}"
    return Text.assemble("\n", (plan.strategy, "bold"), f": {words}")


def _fractions(plan: SwapPlan) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("saved tensor", "keep", "swap", "recompute"):
        table.add_column(name, justify="left" if name == "saved tensor" else "right")
    table.add_column("tokens", no_wrap=True)
    for name, shares in plan.fractions:
        cells = [f"{share:.1%}" if share else "" for share in (shares.keep, shares.swap, shares.recompute)]
        table.add_row(name, *cells, _bar(shares))
    return table


def _bar(shares: Fractions) -> "Text":
    """The tokens of one tensor; without colours the fates differ in their signs."""
    from rich.text import Text

    ends = [round(_BAR * shares.keep), round(_BAR * (shares.keep + shares.swap)), _BAR]
    widths = [ends[0], ends[1] - ends[0], ends[2] - ends[1]]
    return Text.assemble(*((_SIGNS[fate] * width, COLOURS[fate]) for fate, width in zip(COLOURS, widths)))


def _legend() -> "Text":
    from rich.text import Text

    return Text.assemble(*((f" {_SIGNS[fate] * 2} {fate}  ", colour) for fate, colour in COLOURS.items()))
