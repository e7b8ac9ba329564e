"""A placement as a picture: addresses upwards, time to the right, one box per buffer."""

import io
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqpar.offload.placement.buffers import Buffer, Placement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
_PALETTE = ("#4c78a8", "#72b7b2", "#54a24b", "#b8860b", "#f58518", "#e45756", "#b279a2", "#9d755d", "#79706e")


def format_of(path: str) -> str:
    """The format that the name asks for; ``ValueError`` unless it is one of ``FORMATS``."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"--plot {path}: expected a name that ends in .svg or .png")
    return suffix


def plot_placement(
    buffers: Sequence[Buffer], placement: Placement, path: str, capacity: int | None = None, what: str = ""
) -> None:
    """Draw into a .svg or .png; the same placement gives the same SVG. Needs matplotlib.

    Events are drawn at equal distances, because lives are orders, not seconds. ``what`` begins the title. Raises
    ``ValueError`` for another suffix, a file that cannot be written and a missing matplotlib.
    """
    content = picture(buffers, placement, format_of(path), capacity, what)
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def picture(
    buffers: Sequence[Buffer], placement: Placement, format_: str, capacity: int | None = None, what: str = ""
) -> bytes:
    """The same as the content of a file of one of ``FORMATS``."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install 'seqpar[plot]'") from None
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "placement", "font.size": 9}):
        figure = Figure(figsize=(11, 5.6), dpi=150, layout="constrained")
        _draw(figure.add_subplot(), buffers, placement, capacity, what)
        metadata: dict[str, Any] = {"Date": None} if format_ == "svg" else {"Software": None}
        figure.savefig(content, format=format_, metadata=metadata)
    return content.getvalue()


def _draw(axes: "Axes", buffers: Sequence[Buffer], placement: Placement, capacity: int | None, what: str) -> None:
    events = sorted({event for buffer in buffers for event in (buffer.birth, buffer.death)})
    place = {event: index for index, event in enumerate(events)}
    scale, unit = _unit(placement.peak)
    for index, buffer in enumerate(sorted(buffers, key=lambda buffer: placement.offsets[buffer.id])):
        span = (place[buffer.birth], place[buffer.death] - place[buffer.birth])
        colour = _PALETTE[index % len(_PALETTE)]
        box = (placement.offsets[buffer.id] / scale, buffer.size / scale)
        axes.broken_barh([span], box, facecolor=colour, edgecolor="white", linewidth=0.3)
    change = [0] * len(events)
    for buffer in buffers:
        change[place[buffer.birth]] += buffer.size
        change[place[buffer.death]] -= buffer.size
    alive = [bytes_ / scale for bytes_ in accumulate(change)]
    axes.step(range(len(events)), alive, where="post", color="black", linewidth=0.9, label="alive")
    axes.axhline(placement.lower_bound / scale, color="black", linewidth=0.8, linestyle=":", label="lower bound")
    if capacity is not None:
        axes.axhline(capacity / scale, color="#e45756", linewidth=0.8, label="capacity")
    axes.set(xlabel="events", ylabel=f"address, {unit}", xlim=(0, max(len(events) - 1, 1)))
    axes.set_ylim(0, max(placement.peak, capacity or 0) / scale * 1.12)
    axes.set_title(f"{what}{len(buffers)} buffers, peak {placement.peak:,} bytes, {placement.status}")
    axes.legend(loc="upper left", fontsize=8, ncols=3, frameon=False)


def _unit(peak: int) -> tuple[int, str]:
    powers = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next(((scale, name) for scale, name in powers if peak >= scale), (1, "bytes"))
