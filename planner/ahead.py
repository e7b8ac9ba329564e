"""Plans made ahead of time, by another process, while the step runs; and never waited for longer than agreed."""

import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from seqpar.planner import process
from seqpar.planner.plan import Plan
from seqpar.planner.problem.files import costs_to_json
from seqpar.planner.problem.problem import Cluster, CostModel, problem_of
from seqpar.planner.serve import planned, question
from seqpar.planner.solve import Options, static_plan

_SERVE = f"{__name__.rpartition('.')[0]}.serve"
_LONGEST = threading.TIMEOUT_MAX / 2


class Ahead:
    """Asks a planning process for plans, batch by batch, and hands them out in the order they were asked for.

    ``plan()`` waits for a plan that is not ready ``timeout_seconds`` of the wall's clock and no longer (before the
    first answer ``start_seconds`` more, for the process to start); then it is late: the best static plan takes its
    place, and its ``note`` says why. So it does where the process has ended; another one is started then.
    ``options.seconds`` buy work, and a busy machine takes longer for it: the time-out is one of its own.

    The process ends with ``close``, with the ``with`` block, or when nobody holds this object any more. Raises
    ``ValueError`` for a time-out below 0.

    >>> with Ahead(costs, cluster, Options(seconds=0.5)) as ahead:  # doctest: +SKIP
    ...     ahead.ask(lengths_of_the_next_batch)
    ...     plan = ahead.plan()
    """

    def __init__(
        self,
        costs: CostModel,
        cluster: Cluster,
        options: Options,
        *,
        timeout_seconds: float = 10.0,
        start_seconds: float = 60.0,
    ) -> None:
        if not (timeout_seconds >= 0 and start_seconds >= 0):
            raise ValueError(f"expected time-outs of at least 0 seconds, got {timeout_seconds} and {start_seconds}")
        self._costs, self._cluster, self._options = costs, cluster, options
        self._timeout_seconds, self._start_seconds = timeout_seconds, start_seconds
        self._asked: deque[tuple[int, tuple[int, ...]]] = deque()
        self._number = 0
        self._process = self._start()

    def ask(self, lengths: Sequence[int]) -> None:
        """Have a batch of documents of these lengths planned next; returns at once."""
        self._asked.append((self._number, tuple(lengths)))
        self._process.write(question(self._number, lengths, self._options))
        self._number += 1

    def plan(self) -> Plan:
        """The plan of the oldest batch that was asked for; ``ValueError``, with the reason, if there is none."""
        number, lengths = self._asked.popleft()
        text = self._process.answer(number, self._timeout_seconds)
        if text is not None:
            return planned(text)
        note = f"{self._process.why()}: this is the best static plan"
        if self._process.ended:
            self.close()
            self._process = self._start()
        return static_plan(problem_of(lengths, self._cluster, self._costs), self._options, note)

    def close(self) -> None:
        """End the process."""
        self._ended()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> "_Process":
        """A process that has been asked all that is still to be answered."""
        process = _Process(self._start_seconds)
        self._ended = weakref.finalize(self, _end, process, os.getpid())
        process.write(costs_to_json(self._costs, self._cluster).replace("\n", " "))
        for number, lengths in self._asked:
            process.write(question(number, lengths, self._options))
        return process


def _command() -> list[str]:
    """``serve`` as a process that finds this package where it lies, and the rest where this process does; but for the
    current folder, which may be anybody's."""
    top = sys.modules[_SERVE.partition(".")[0]].__file__
    assert top is not None, "a package with an __init__.py has a file"
    here = Path.cwd()
    paths = [path for path in sys.path if Path(path).is_absolute() and Path(path) != here]
    return [sys.executable, "-I", "-S", process.__file__, _SERVE, str(Path(top).resolve().parent.parent), *paths]


def _end(process: "_Process", owner: int) -> None:
    """End a process; nothing in a fork of the process that started it."""
    if os.getpid() == owner:
        process.close()


class _Process:
    """``seqpar.planner.serve`` in a process of its own; a thread listens to it, so that waiting can end."""

    def __init__(self, start_seconds: float) -> None:
        self._popen = subprocess.Popen(
            _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", bufsize=1
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._ear: IO[str] = self._popen.stdout
        self._mouth: IO[str] = self._popen.stdin
        self._heard: queue.Queue[str] = queue.Queue()
        self._patience = start_seconds
        self.ended = False
        self._listener = threading.Thread(target=self._listen, name="plans", daemon=True)
        self._listener.start()

    def write(self, line: str) -> None:
        try:
            self._mouth.write(f"{line}\n")
        except OSError:
            return  # it has ended, as the listener knows

    def answer(self, number: int, seconds: float) -> str | None:
        """What was said to this question; None if nothing was within these seconds, or the process has ended."""
        until = time.monotonic() + min(seconds + self._patience, _LONGEST)
        while not self.ended:
            try:
                heard, _, text = self._heard.get(timeout=max(0.0, until - time.monotonic())).partition(" ")
            except queue.Empty:
                return None
            self._patience = 0.0
            self.ended = not heard
            if heard == str(number):  # others came too late, and nobody waits for them any more
                return text
        return None

    def why(self) -> str:
        """Why there is no answer."""
        if self.ended:
            return f"the planning process ended with code {self._popen.wait()}"
        return "the planning process was late"

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        if threading.current_thread() is not self._listener:  # as it may be where garbage is collected
            self._listener.join()
        for pipe in (self._mouth, self._ear):
            try:
                pipe.close()
            except OSError:
                continue  # a question was under way when it ended

    def _listen(self) -> None:
        """Every line, and an empty one when there are no more."""
        for line in self._ear:
            self._heard.put(line)
        self._heard.put("")
