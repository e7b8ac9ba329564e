"""Plans made ahead of time, by another process, while the step runs; and never waited for longer than agreed."""

import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from seqpar.planner.plan import Plan
from seqpar.planner.problem.files import costs_to_json
from seqpar.planner.problem.problem import Cluster, CostModel, problem_of
from seqpar.planner.serve import planned, question
from seqpar.planner.solve import Options, static_plan

_START_SECONDS = 10.0  # what a process may take to be there
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from seqpar.planner.serve import main; main()"


class Ahead:
    """Asks a planning process for plans, batch by batch, and hands them out in the order they were asked for.

    ``plan()`` waits for a plan that is not ready no longer than ``options.seconds`` (and, before the first one, for the
    process to start); then the best static plan takes its place, and its ``note`` says why. So it does where the
    process has ended; another one is started then.

    >>> with Ahead(costs, cluster, Options(seconds=0.5)) as ahead:  # doctest: +SKIP
    ...     ahead.ask(lengths_of_the_next_batch)
    ...     plan = ahead.plan()
    """

    def __init__(self, costs: CostModel, cluster: Cluster, options: Options) -> None:
        self._costs, self._cluster, self._options = costs, cluster, options
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
        text = self._process.answer(number, self._options.seconds)
        if text is not None:
            return planned(text)
        note = f"{self._process.why()}: this is the best static plan"
        if self._process.ended:
            self._process.close()
            self._process = self._start()
        return static_plan(problem_of(lengths, self._cluster, self._costs), self._options, note)

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> "_Process":
        """A process that has been asked all that is still to be answered."""
        process = _Process()
        process.write(costs_to_json(self._costs, self._cluster).replace("\n", " "))
        for number, lengths in self._asked:
            process.write(question(number, lengths, self._options))
        return process


class _Process:
    """``seqpar.planner.serve`` in a process of its own; a thread listens to it, so that waiting can end."""

    def __init__(self) -> None:
        root = str(Path(__file__).absolute().parents[2])  # of the package, whatever link led here
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._ear: IO[str] = self._popen.stdout
        self._mouth: IO[str] = self._popen.stdin
        self._heard: queue.Queue[str] = queue.Queue()
        self._patience = _START_SECONDS
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
        until = time.monotonic() + seconds + self._patience
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
