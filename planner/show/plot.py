"""A plan as a picture: what every rank does, from the first micro-batch to the last."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqpar.planner.plan import Plan, PlannedGroup
from seqpar.planner.show.report import shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
_PALETTE = (
    "#4c78a8",
    "#72b7b2",
    "#54a24b",
    "#b8860b",
    "#f58518",
    "#e45756",
    "#b279a2",
    "#9d755d",
    "#79706e",
    "#2f4b7c",
)
_IDLE = "#eceff1"
_EDGE = "white"


def format_of(path: str) -> str:
    """The format that the name asks for; ``ValueError`` unless it is one of ``FORMATS``."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"--plot {path}: expected a name that ends in .svg or .png")
    return suffix


def plot(plan: Plan, path: str) -> None:
    """Draw the timeline of ranks into a file; the same plan gives the same SVG. Needs matplotlib."""
    content = picture(plan, format_of(path))
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def picture(plan: Plan, format_: str) -> bytes:
    """The same as the content of a file of one of ``FORMATS``."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install 'seqpar[plot]'") from None
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "plan", "font.size": 9, "hatch.linewidth": 0.6}):
        figure = Figure(figsize=(11, 5.6), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, plan)
        metadata: dict[str, Any] = {"Date": None} if format_ == "svg" else {"Software": None}
        figure.savefig(content, format=format_, metadata=metadata)
    return content.getvalue()


def _draw(axes: "Axes", plan: Plan) -> None:
    degrees = sorted({group.degree for batch in plan.micro_batches for group in batch.groups})
    colours = {degree: _colour(degree) for degree in degrees}
    start = 0.0
    for number, batch in enumerate(plan.micro_batches):
        axes.broken_barh([(start, batch.seconds)], (-0.5, plan.devices), facecolor=_IDLE)
        for group in batch.groups:
            _draw_group(axes, plan, group, start, colours[group.degree])
        if number:
            axes.axvline(start, color="black", linewidth=0.9)
        start += batch.seconds
    axes.axvline(plan.lower_bound_seconds, color="#d62728", linestyle="--", linewidth=1.4)
    axes.set_xlim(0, plan.step_seconds * 1.005)
    axes.set_ylim(plan.devices - 0.5, -0.5)
    axes.set_xlabel("seconds")
    axes.set_ylabel("rank")
    axes.set_yticks(_ticks(plan.devices))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(plan), loc="left", fontsize=10)
    _legend(axes, colours)


def _colour(degree: int) -> str:
    """The same for a degree in every picture; degrees between two powers of two share one."""
    return _PALETTE[(degree.bit_length() - 1) % len(_PALETTE)]


def _draw_group(axes: "Axes", plan: Plan, group: PlannedGroup, start: float, colour: str) -> None:
    """A bar for its fixed cost (pale), computation (full) and communication (hatched), with its degree in it."""
    rows = (group.ranks[0] - 0.5, group.degree)
    edge = 0.8 if plan.devices <= 128 else 0.1
    at = start
    parts: tuple[tuple[float, dict[str, Any]], ...] = (
        (group.fixed_seconds, {"alpha": 0.35}),
        (group.compute_seconds, {}),
        (group.communication_seconds, {"alpha": 0.75, "hatch": "////"}),
    )
    for seconds, style in parts:
        if seconds > 0:
            axes.broken_barh([(at, seconds)], rows, facecolor=colour, edgecolor=_EDGE, linewidth=edge, **style)
        at += seconds
    if group.degree * 40 >= plan.devices and group.seconds * 12 >= plan.step_seconds:
        count = len(group.documents)
        axes.text(start + group.fixed_seconds + group.compute_seconds / 2, group.ranks[0] + group.degree / 2 - 0.5,
                  f"{count} document{'s' if count > 1 else ''}", ha="center", va="center", color="white",
                  fontsize=min(9.0, 4 + 160 * group.degree / plan.devices), clip_on=True)  # fmt: skip


def _ticks(devices: int) -> list[int]:
    step = max(1, devices // 8)
    return [*range(0, devices, step)]


def _title(plan: Plan) -> str:
    best = [row for row in plan.baselines if row.name == "best_static"]
    faster = f", {best[0].seconds / plan.step_seconds:.2f}x as fast as the best static plan" if best else ""
    gap = "proven optimal" if plan.gap == 0 else f"at most {plan.gap:.1%} above the best there can be"
    shapes = shape(plan)
    shapes = shapes if len(shapes) <= 110 else shapes[:107] + "..."
    what = f"{plan.num_documents:,} documents on {plan.cluster}, {plan.model}"
    return f"{what}: a step of {plan.step_seconds:.3f} s, {gap}{faster}\n{shapes}"


def _legend(axes: "Axes", colours: dict[int, str]) -> None:
    axes.legend(
        handles=list(_handles(colours)),
        loc="upper left",
        bbox_to_anchor=(1.005, 1.0),
        frameon=False,
        fontsize=8,
        title="ranks in a group",
        title_fontsize=8,
        alignment="left",
    )


def _handles(colours: dict[int, str]) -> Iterator[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for degree, colour in sorted(colours.items(), reverse=True):
        yield Patch(facecolor=colour, label=str(degree))
    grey = "#607d8b"
    yield Patch(facecolor=grey, alpha=0.35, label="fixed")
    yield Patch(facecolor=grey, label="compute")
    yield Patch(facecolor=grey, alpha=0.75, hatch="////", edgecolor=_EDGE, label="communication")
    yield Patch(facecolor=_IDLE, label="idle")
    yield Line2D([], [], color="#d62728", linestyle="--", label="lower bound")
