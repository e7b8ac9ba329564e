"""The scaling picture: each way of cutting as a bar, its step time over that of one rank."""

from pathlib import Path

from bench.models.measure import Result

COLOURS = {2: "#4878a8", 4: "#d9a05b"}


def draw(results: list[Result], path: Path) -> None:
    """Two panels a model: the same sequence on more ranks (lower is faster), and the same tokens per rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mixers = sorted({result.case.mixer for result in results})
    figure, axes = pyplot.subplots(len(mixers), 2, figsize=(13, 3.6 * len(mixers)), squeeze=False)
    for row, mixer in zip(axes, mixers):
        for axis, scaling in zip(row, ("total", "per_rank")):
            chosen = [r for r in results if (r.case.mixer, r.case.scaling) == (mixer, scaling)]
            _panel(axis, chosen, "same sequence, more ranks" if scaling == "total" else "same tokens per rank")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axis, results: list[Result], title: str) -> None:  # type: ignore[no-untyped-def]
    base = next(r for r in results if r.case.ranks == 1)
    cut = [r for r in results if r.case.ranks > 1]
    ways = list(dict.fromkeys((r.case.way, r.case.layout) for r in cut))
    counts = sorted({r.case.ranks for r in cut})
    width = 0.8 / len(counts)
    for offset, count in enumerate(counts):
        chosen = [next(r for r in cut if (r.case.way, r.case.layout, r.case.ranks) == (*way, count)) for way in ways]
        heights = [result.ratio(base) for result in chosen]
        places = [i + (offset - (len(counts) - 1) / 2) * width for i in range(len(ways))]
        bars = axis.bar(places, heights, width * 0.92, color=COLOURS.get(count, "#888888"), label=f"{count} ranks")
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.axhline(1.0, color="#444444", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(ways)), [f"{way}\n{layout}" for way, layout in ways], fontsize=8)
    axis.set_ylabel("step time / one rank")
    axis.set_title(f"{base.case.mixer} attention: {title} (one rank: {base.case.tokens:,} tokens)", fontsize=10)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
