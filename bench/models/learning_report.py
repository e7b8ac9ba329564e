"""What :mod:`bench.models.learning` found, as a table and as a picture."""

from pathlib import Path
from typing import Any

from bench.models import rows

CLOSE = 1e-4  # relative
LEAST = 1e-16  # where a difference of 0 is drawn
MARKS = {
    "difference": ("o", "#d94801", "two ranks and one, fp32"),
    "of_rounding": ("s", "#969696", "one rank and one whose weights are rounded otherwise"),
    "in_fp64": ("^", "#238b45", "two ranks and one, fp64"),
}


def show(report: dict) -> None:
    """Print both parts as one table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "first loss", "last loss", "2 ranks - 1", "by rounding", "in fp64", "recall", "in steps")
    texts, recalled = ({each["name"]: each for each in report[part]} for part in ("text", "recall"))
    for name in texts | recalled:
        table.add_row(name, *_learnt(texts.get(name)), *_recalled(recalled.get(name)))
    Console(width=110).print(table, f"entropy of single bytes: {report['unigram_entropy']:.3f} nats")


def _learnt(found: dict | None) -> list[str]:
    if found is None:
        return [""] * 5
    apart = [found[part] for part in ("difference", "of_rounding", "in_fp64")]
    return [f"{found['losses'][0]:.3f}", f"{found['loss']:.3f}", *("" if x is None else f"{x:.1e}" for x in apart)]


def _recalled(found: dict | None) -> list[str]:
    return ["", ""] if found is None else [f"{found['accuracy']:.3f}", f"{found['steps']}"]


def _differences(axes: Any, texts: list[dict]) -> None:
    for part, (mark, colour, label) in MARKS.items():
        there = [(max(row[part], LEAST), place) for place, row in enumerate(texts) if row[part] is not None]
        axes.plot(*zip(*there) if there else ((), ()), mark, color=colour, label=label, markersize=5)
    axes.axvline(CLOSE, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("relative difference of the last losses (0 is drawn at the left edge)")


def plot(report: dict, path: Path) -> None:
    """Each row's loss beside the entropy of single bytes, and how far two ranks are from one."""
    texts = report["text"]
    figure, left, right = rows.panels([row["name"] for row in texts])
    left.plot([row["loss"] for row in texts], range(len(texts)), "o", color="#084594")
    left.axvline(report["unigram_entropy"], color="black", linewidth=0.8, label="entropy of single bytes")
    left.set_xlabel("nats per byte, mean of the last 20 of 200 steps")
    _differences(right, texts)
    for axes in (left, right):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)
    rows.save(figure, path)
