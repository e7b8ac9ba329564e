"""Buffers with lives, and where in one address range each of them lies."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Buffer:
    """Bytes that are needed for a while.

    The life is half-open: the buffer exists from event ``birth`` up to, but not including, event ``death``.
    Two buffers may share bytes exactly if no event lies in both lives.

    Raises ``ValueError`` for a negative size or a life that ends before it begins.
    """

    id: str
    size: int
    birth: int
    death: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"buffer {self.id}: size {self.size}, expected at least 0 bytes")
        if self.death <= self.birth:
            raise ValueError(
                f"buffer {self.id}: upper {self.death} is not above lower {self.birth}; "
                "a life [lower, upper) holds at least one event"
            )

    def overlaps(self, other: "Buffer") -> bool:
        """Whether some event lies in both lives."""
        return self.birth < other.death and other.birth < self.death


@dataclass(frozen=True)
class Placement:
    """An offset in bytes for every buffer, and how far the peak is from the least possible.

    ``status`` is ``"optimal"`` if no placement has a lower peak (``peak == lower_bound``, or a search proved it),
    else ``"feasible"``. ``stage`` names what found it; ``note`` says what a guard ended before its work was done.
    """

    offsets: Mapping[str, int]
    peak: int
    lower_bound: int
    status: str
    stage: str
    seconds: float
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", MappingProxyType(dict(self.offsets)))

    @property
    def gap(self) -> float:
        """How far the peak is above the lower bound, as a fraction of the lower bound."""
        return 0.0 if self.peak == self.lower_bound else self.peak / self.lower_bound - 1.0


def check_ids(buffers: Iterable[Buffer]) -> None:
    """Raise ``ValueError`` if two buffers have the same id."""
    seen: set[str] = set()
    for buffer in buffers:
        if buffer.id in seen:
            raise ValueError(f"buffer {buffer.id} comes twice; every id must be different")
        seen.add(buffer.id)
