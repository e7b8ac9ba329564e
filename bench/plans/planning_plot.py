"""The planning picture: for each section the plans and the static steps over the bound, and the seconds of planning."""

from pathlib import Path
from statistics import fmean
from typing import Any

from bench.plans.planning_result import Result

HIGHEST = 2.2  # bars are cut here; their labels say how high they are
BARS = (("planned", "#4878a8"), ("best static", "#d9a05b"), ("static", "#b0645c"))


def draw(results: list[Result], path: Path) -> None:
    """Two panels: mean steps over the bound (1 is proven optimal), and what planning took, a dot a batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "planning"
    names = list(dict.fromkeys(result.section for result in results))
    mine = [[result for result in results if result.section == name] for name in names]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.2), width_ratios=(2, 1))
    _steps(left, names, mine)
    _planning(right, names, mine)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _steps(axis: Any, names: list[str], sections: list[list[Result]]) -> None:
    rows = ([fmean(r.step_seconds / r.lower_bound_seconds for r in mine) for mine in sections],
            [fmean(r.best_static_seconds / r.lower_bound_seconds for r in mine) for mine in sections],
            [fmean(r.static_seconds / r.lower_bound_seconds for r in mine) for mine in sections])  # fmt: skip
    width = 0.8 / len(BARS)
    for offset, (heights, (label, colour)) in enumerate(zip(rows, BARS)):
        places = [i + (offset - 1) * width for i in range(len(names))]
        bars = axis.bar(places, [min(height, HIGHEST) for height in heights], width * 0.92, color=colour, label=label)
        axis.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=7)
    axis.axhline(1.0, color="#444444", linewidth=1, linestyle="--", label="lower bound")
    axis.set_xticks(range(len(names)), [f"{name}\n{len(mine)}" for name, mine in zip(names, sections)], fontsize=9)
    axis.set_ylabel("predicted step / lower bound")
    axis.set_title(f"Steps over what no plan can beat, mean over so many batches (cut at {HIGHEST})", fontsize=10)
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="upper left")
    axis.set_ylim(0, HIGHEST * 1.15)
    axis.spines[["top", "right"]].set_visible(False)


def _planning(axis: Any, names: list[str], sections: list[list[Result]]) -> None:
    for place, mine in enumerate(sections):
        shifts = [place + 0.5 * ((index * 0.618) % 1 - 0.5) for index in range(len(mine))]
        axis.scatter(
            shifts,
            [result.wall_seconds for result in mine],
            s=9,
            color="#4878a8",
            alpha=0.5,
            linewidths=0,
            rasterized=True,
        )
    axis.set_yscale("log")
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=30, ha="right")
    axis.set_ylabel("planning seconds, one core")
    axis.set_title("What planning took, a dot a batch", fontsize=10)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
