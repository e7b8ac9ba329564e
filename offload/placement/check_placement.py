"""An independent look at a placement: shares no code with what makes placements."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

from seqpar.offload.placement.buffers import Buffer, Placement


def check_placement(buffers: Iterable[Buffer], placement: Placement, capacity: int | None = None) -> None:
    """Raise ``ValueError`` unless ``placement`` is what it says.

    Every buffer has an offset of at least 0 and nothing else has one; no two buffers share a byte at one event; the
    peak is the highest end of a buffer and within ``capacity``; the lower bound is not above the peak and not below
    the most bytes that live at once; ``"optimal"`` has no gap. A bound that a search proved to be above the live bytes
    is believed.
    """
    listed = list(buffers)
    _check_ids(listed, placement)
    _check_peak(listed, placement, capacity)
    _check_bound(listed, placement)
    _check_disjoint(listed, placement)


def _check_ids(buffers: list[Buffer], placement: Placement) -> None:
    ids = [buffer.id for buffer in buffers]
    if len(set(ids)) < len(ids):
        raise ValueError("two buffers have the same id")
    for name in ids:
        if name not in placement.offsets:
            raise ValueError(f"buffer {name} has no offset")
        offset = placement.offsets[name]
        if not isinstance(offset, int) or offset < 0:
            raise ValueError(f"buffer {name} has offset {offset!r}; expected a whole number of at least 0")
    for name in placement.offsets:
        if name not in set(ids):
            raise ValueError(f"offset for {name}, which is no buffer")


def _check_peak(buffers: list[Buffer], placement: Placement, capacity: int | None) -> None:
    for buffer in buffers:
        end = placement.offsets[buffer.id] + buffer.size
        if end > placement.peak:
            raise ValueError(f"buffer {buffer.id} ends at {end}, above the peak {placement.peak}")
    if placement.peak and all(placement.offsets[buffer.id] + buffer.size < placement.peak for buffer in buffers):
        raise ValueError(f"peak {placement.peak}, but no buffer reaches it")
    if capacity is not None and placement.peak > capacity:
        raise ValueError(f"peak {placement.peak} is above the capacity {capacity}")


def _check_bound(buffers: list[Buffer], placement: Placement) -> None:
    live = most = 0
    changes = [(buffer.birth, buffer.size) for buffer in buffers] + [(buffer.death, -buffer.size) for buffer in buffers]
    for _, change in sorted(changes):  # at one event the negative ones come first
        live += change
        most = max(most, live)
    if not most <= placement.lower_bound <= placement.peak:
        raise ValueError(
            f"lower bound {placement.lower_bound}; expected between {most} live bytes and the peak {placement.peak}"
        )
    if placement.status not in ("optimal", "feasible"):
        raise ValueError(f"status {placement.status!r}; expected 'optimal' or 'feasible'")
    if placement.status == "optimal" and placement.lower_bound != placement.peak:
        raise ValueError(f"optimal, but peak {placement.peak} is not the lower bound {placement.lower_bound}")


def _check_disjoint(buffers: list[Buffer], placement: Placement) -> None:
    """Play the events: whoever is born must find its bytes free. Live ranges are kept in order of address."""
    events = [(buffer.birth, 1, buffer) for buffer in buffers if buffer.size]
    events += [(buffer.death, 0, buffer) for buffer in buffers if buffer.size]
    live: list[tuple[int, int, str]] = []
    for _, born, buffer in sorted(events, key=lambda event: event[:2]):
        begin = placement.offsets[buffer.id]
        entry = (begin, begin + buffer.size, buffer.id)
        if not born:
            del live[bisect_left(live, entry)]
            continue
        place = bisect_right(live, entry)
        for other in live[max(0, place - 1) : place + 1]:
            if other[0] < entry[1] and entry[0] < other[1]:
                raise ValueError(
                    f"buffers {other[2]} [{other[0]}, {other[1]}) and {entry[2]} [{entry[0]}, {entry[1]}) "
                    f"share bytes at event {buffer.birth}"
                )
        insort(live, entry)
