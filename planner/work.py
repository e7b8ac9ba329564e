"""How much work planning may do: units that are the same on every machine, and a guard behind them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

_PACK_SECONDS = 0.65e-3  # what a packing takes on a slow core: so much, and so much for each document and group
_DOCUMENT_SECONDS = 6e-6
_GROUP_SECONDS = 2.6e-6
_SCANNED = 10_000  # groups that are looked through, in some packings, in the time that placing a document takes anyway
_LP_SECONDS = 1.5e-3
_SPLIT_SECONDS = 1.5e-7
_SUM_SECONDS = 0.9e-8
_SET_SECONDS = 0.3e-3
_FEW_PROGRAMS = 20
_MOST_IN_SUBSETS = 14
_LP_COLUMN_SECONDS = 11e-6


_LOOK_SECONDS = 0.4e-3  # between two moments when HiGHS asks whether to go on: so much, and so much for each variable
_LOOK_VARIABLE_SECONDS = 1e-5

_GUARD_SECONDS = 30.0  # the guard is far behind the work, so that it speaks only where units are priced wrongly
_GUARD_TIMES = 10.0


def guard_seconds(seconds: float) -> float:
    """How long planning may take in all, of the processor's time, where its work was to take so many seconds."""
    return _GUARD_SECONDS + _GUARD_TIMES * seconds


@dataclass
class Work:
    """Units of work, which alone decide how far planning goes, and a guard behind them that ends it all the same.

    Units make plans reproducible on every machine, however busy. The guard counts the processor's time of this thread
    (``clock``), which a busy machine does not stretch; ``stopped`` says what it ended, and how much of it was done.
    """

    seconds: float = float("inf")
    clock: Callable[[], float] = time.thread_time
    stopped: list[str] = field(default_factory=list)
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def take(self, units: int, name: str = "units", keep: float = 0.0, sure: int = 0) -> "Share":
        """A share of so many units, which the guard ends while this part of its seconds is left for others; but for
        the first ``sure`` ones, without which there would be nothing."""
        return Share(self, max(0, units), name, self.seconds * (1 - keep), sure)

    @property
    def spent(self) -> float:
        """Seconds of the processor so far."""
        return self.clock() - self.begun

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    @property
    def late(self) -> bool:
        """Whether the guard spoke before the work was done."""
        return bool(self.stopped)

    @property
    def note(self) -> str:
        """What the guard ended; empty if nothing."""
        if not self.late:
            return ""
        return f"the guard of {self.seconds:g} s of the processor's time ended planning: {', '.join(self.stopped)} done"


@dataclass
class Share:
    """Call it for each unit of work: False once its units, or the time of the whole, are used up."""

    work: Work
    units: int
    name: str
    until: float
    sure: int = 0
    done: int = 0

    def __call__(self) -> bool:
        if self.done >= self.units:
            return False
        if self.done >= self.sure and self.work.spent > self.until:
            self.work.stopped.append(f"{self.done:,} of {self.units:,} {self.name}")
            self.units = self.done
            return False
        self.done += 1
        return True


def packings(seconds: float, individual: int, groups: int) -> int:
    """How many packings of so many documents, placed one by one, into so many groups fit in these seconds."""
    placing = _DOCUMENT_SECONDS * individual * (1 + groups / _SCANNED)
    return int(seconds / (_PACK_SECONDS + placing + _GROUP_SECONDS * groups))


def relaxations(seconds: float, kinds: int, micro_batches: int) -> int:
    """How many fluid relaxations fit in these seconds."""
    return int(seconds / (_LP_SECONDS + _LP_COLUMN_SECONDS * 64 * kinds * min(micro_batches, 4)))


def subset_programs(seconds: float, documents: int) -> int:
    """How many programs over all subsets of so many documents fit in these seconds, after setting up; 0 if few do."""
    if documents > _MOST_IN_SUBSETS:
        return 0
    splits = 3.0**documents
    programs = int((seconds - splits * _SPLIT_SECONDS) / (_SET_SECONDS + splits * _SUM_SECONDS))
    return programs if programs >= _FEW_PROGRAMS else 0


def looks(seconds: float, variables: int) -> int:
    """How often HiGHS, at work on a program of so many variables, asks whether to go on in these seconds."""
    return int(seconds / (_LOOK_SECONDS + _LOOK_VARIABLE_SECONDS * variables))
