"""How much work planning may do: units that are the same on every machine, and a clock behind them."""

import time
from dataclasses import dataclass

_PACK_SECONDS = 0.65e-3  # what a packing takes on a slow core: so much, and so much for each document and group
_DOCUMENT_SECONDS = 4e-6
_GROUP_SECONDS = 2.6e-6
_SCANNED = 1500  # groups that are looked through in the time that placing a document takes anyway
_LP_SECONDS = 1.5e-3
_SPLIT_SECONDS = 1.5e-7
_SUM_SECONDS = 0.9e-8
_SET_SECONDS = 0.3e-3
_FEW_PROGRAMS = 20
_MOST_IN_SUBSETS = 14
_LP_COLUMN_SECONDS = 11e-6


@dataclass
class Work:
    """Units of work that are left, and the moment when the clock ends it all the same.

    Units make plans reproducible; the clock makes them punctual. ``late`` says that the clock spoke first.
    """

    until: float
    late: bool = False

    def take(self, units: int, before_end: float = 0.0, sure: int = 0) -> "Share":
        """A share of so many units, which the clock ends so many seconds before the end of all; but for the first
        ``sure`` ones, without which there would be nothing."""
        return Share(self, max(0, units), self.until - before_end, sure)

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.until - time.monotonic())


@dataclass
class Share:
    """Call it for each unit of work: False once its units, or the time of the whole, are used up."""

    work: Work
    units: int
    until: float
    sure: int = 0

    def __call__(self) -> bool:
        if self.units <= 0:
            return False
        if time.monotonic() > self.until:
            self.work.late = True
            if self.sure <= 0:
                return False
        self.units -= 1
        self.sure -= 1
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
