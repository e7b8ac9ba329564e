"""Lanes: where copies happen beside the computation, as threads on a CPU or as streams on CUDA.

A lane does what it is given in order. Nothing else is promised: whoever gives it work says what must be done before
(``after``) and which tensors must live until it is done (``holds``), and waits before using the result.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Done(Protocol):
    """The promise that some work gets done."""

    def wait(self) -> None:
        """What follows on the current thread and stream finds the work done; raises the error if it failed."""
        ...


class Lane(Protocol):
    """Does copies one after the other, beside the computation."""

    def submit(
        self, work: Work, holds: Sequence[Tensor], after: Sequence[Done] = (), finished: Work | None = None
    ) -> Done:
        """Do ``work`` after all that was computed and given to this lane before, and after ``after``.

        ``holds`` are the tensors that ``work`` reads or writes; the lane keeps them alive until it is done. Then, at
        the latest before they go, it calls ``finished``, which must not raise.
        """
        ...

    def settle(self) -> None:
        """Everything given so far is done for whatever follows, and nothing is held any more."""
        ...

    def close(self) -> None:
        """Finish what was given, then take no more."""
        ...


class InPlace:
    """A lane that does its work at once: the plainest one, for what is small or to compare with."""

    def submit(
        self, work: Work, holds: Sequence[Tensor], after: Sequence[Done] = (), finished: Work | None = None
    ) -> Done:
        _run(work, [], list(after), finished)
        return _Already()

    def settle(self) -> None: ...

    def close(self) -> None: ...


class _Already:
    def wait(self) -> None: ...


class ThreadLane:
    """A background thread: for memory that the CPU computes in, so its work is done once the thread has done it."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future[None] | None = None

    def submit(
        self, work: Work, holds: Sequence[Tensor], after: Sequence[Done] = (), finished: Work | None = None
    ) -> Done:
        self._last = self._pool.submit(_run, work, list(holds), list(after), finished)
        return _Finished(self._last)

    def settle(self) -> None:
        if self._last is not None:
            self._last.exception()

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def _run(work: Work, holds: list[Tensor], after: list[Done], finished: Work | None) -> None:
    for done in after:
        done.wait()
    work()
    if finished is not None:
        finished()
    holds.clear()


class _Finished:
    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class StreamLane:
    """A CUDA stream. ``api`` is ``torch.cuda``, or what tests put in its place.

    Never ``record_stream``, which lets memory grow without bound: the lane holds the tensors until their event has
    happened, so the allocator cannot give their memory away before.
    """

    def __init__(self, api: Any = None) -> None:
        self._api = torch.cuda if api is None else api
        self._stream = self._api.Stream()
        self._flying: deque[_Flight] = deque()

    def submit(
        self, work: Work, holds: Sequence[Tensor], after: Sequence[Done] = (), finished: Work | None = None
    ) -> Done:
        while self._flying and self._flying[0].landed():
            self._flying.popleft()
        # The stream that is current now, asked for every time: the user may have changed it since the last call. And
        # asked outside of `with stream`, where it would be the lane's own, for which waiting means nothing.
        home = self._api.current_stream()
        self._stream.wait_event(home.record_event())
        flight = _Flight(self._api, home, list(holds), finished)
        with self._api.stream(self._stream):
            for done in after:
                done.wait()
            try:
                work()
            finally:  # a copy that was launched before the error is still under way
                flight.event = self._stream.record_event()
                self._flying.append(flight)
        return flight

    def settle(self) -> None:
        while self._flying:
            self._flying.popleft().wait()

    def close(self) -> None:
        self._stream.synchronize()
        self.settle()


class _Flight:
    """A copy under way: what it reads and writes, and the event after it."""

    def __init__(self, api: Any, home: Any, holds: list[Tensor], finished: Work | None) -> None:
        self._api, self._home, self._holds, self._finished = api, home, holds, finished
        self.event: Any = None

    def wait(self) -> None:
        current = self._api.current_stream()
        current.wait_event(self.event)
        # Memory goes back to the stream that it came from; once that stream has waited, whoever gets it comes later.
        if current == self._home:
            self._let_go()

    def landed(self) -> bool:
        """Whether it is over, as far as the host knows; then nothing is held any more."""
        if self._holds and self.event.query():
            self._let_go()
        return not self._holds

    def _let_go(self) -> None:
        finished, self._finished = self._finished, None
        if finished is not None:
            finished()
        self._holds.clear()


def lanes_for(device: torch.device) -> tuple[Lane, Lane]:
    """Two lanes beside the computation on ``device``: one for what leaves it, one for what comes back."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return StreamLane(), StreamLane()
    return ThreadLane("leaving"), ThreadLane("returning")
