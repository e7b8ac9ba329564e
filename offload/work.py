"""How much work a placement may take: steps that are the same on every machine, and a guard behind them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

_GUARD_SECONDS = 5.0  # the guard is far behind the work, so that it speaks only where steps are priced wrongly
_GUARD_TIMES = 10.0


@dataclass
class Work:
    """Work that is left, in seconds of a slow core that is free, and a guard that ends it all the same.

    What is spent is counted and priced, never timed, so it is the same on every machine, however busy. The guard counts
    the processor's time of this thread (``clock``), which a busy machine does not stretch; ``late`` says that it spoke.
    """

    seconds: float
    clock: Callable[[], float] = time.thread_time
    spent: float = field(init=False, default=0.0)
    late: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.until = self.clock() + _GUARD_SECONDS + _GUARD_TIMES * self.seconds

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def spend(self, seconds: float) -> bool:
        """Take so much; False once all is used up, or the guard speaks."""
        self.spent += seconds
        self.late = self.late or self.clock() > self.until
        return not self.late and self.spent < self.seconds
