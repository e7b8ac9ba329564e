"""A calibration as a table: what each kind of group costs, and how far that is from what was timed."""

from typing import TYPE_CHECKING

from seqpar.estimates.calibrate import Calibration
from seqpar.planner.problem.problem import GroupKind

if TYPE_CHECKING:
    from rich.console import Group as Renderables
    from rich.table import Table

TOO_FAR = 0.2  # the error above which plans are not to be trusted
_COLUMNS = (
    "degree",
    "transport",
    "squared",
    "linear",
    "exchange",
    "fixed",
    "start",
    "samples",
    "mean error",
    "largest",
)


def report(calibration: Calibration) -> "Renderables":
    """What rich prints: a row for each degree and transport, and a warning where the fit is far from its samples."""
    from rich.console import Group
    from rich.text import Text

    costs, cluster = calibration.costs, calibration.cluster
    head = Text.assemble((f"{costs.name} on {cluster.name}", "bold"), f": {_memory(calibration)}")
    units = Text("ms: squared per (1k tokens)², linear and exchange per 1k tokens, fixed and start per step", "dim")
    parts: list[Table | Text] = [head, _table(calibration), units]
    if calibration.largest_error > TOO_FAR:
        parts.append(Text(_warning(calibration), "yellow"))
    return Group(*parts)


def _table(calibration: Calibration) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "transport" else "right", no_wrap=True)
    for kind, error in zip(calibration.costs.kinds, calibration.errors):
        largest = Text(f"{error.largest:.1%}", "yellow" if error.largest > TOO_FAR else "")
        table.add_row(
            str(kind.degree),
            kind.transport.replace("_", "-"),
            *_milliseconds(kind),
            str(error.num_samples),
            f"{error.mean:.1%}",
            largest,
        )
    return table


def _milliseconds(kind: GroupKind) -> list[str]:
    found = (
        kind.quadratic_seconds * 1e9,
        kind.linear_seconds * 1e6,
        kind.message_seconds * 1e6,
        kind.fixed_seconds * 1e3,
        kind.latency_seconds * 1e3,
    )
    return [f"{value:.4g}" if value else "-" for value in found]


def _memory(calibration: Calibration) -> str:
    costs, cluster = calibration.costs, calibration.cluster
    left = max(0.0, cluster.memory_bytes - costs.state_bytes)
    return (
        f"{costs.bytes_per_token / 2**10:,.4g} KiB a token, {costs.state_bytes / 2**20:,.4g} MiB of state, room for "
        f"{int(left / costs.bytes_per_token):,} tokens in {cluster.memory_bytes / 2**30:,.4g} GiB a device"
    )


def _warning(calibration: Calibration) -> str:
    worst = max(calibration.errors, key=lambda error: error.largest)
    over = "" if worst.degree == 1 else f" over {worst.transport.replace('_', '-')}"
    return (
        f"Warning: degree {worst.degree}{over} is up to {worst.largest:.0%} off what was timed: "
        "time longer documents (--tokens), repeat more (--repeats), or quiet the machine."
    )
