"""Standard output of a command: nobody else writes there, and when it is gone the command ends in order."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

INTERRUPTED = 130  # what a shell says of a program that SIGINT ended
READER_GONE = 141  # and SIGPIPE
NOT_WRITTEN = 2


class _OutputError(OSError):
    """Standard output did not take what was printed."""


class _Output(io.FileIO):
    """A descriptor whose faults can be told from those of other files."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise _OutputError(error.errno, error.strerror) from error


def run_main(main: Callable[[], int]) -> int:
    """Run a command as the whole of this process; returns its exit status.

    - What libraries print on file descriptor 1, past Python, goes to standard error: ``--json`` is nothing but JSON.
    - A reader that has seen enough (``| head``) ends the command without a word, with 141.
    - Output that cannot be written (a full disk) is one line on standard error, and 2.
    - SIGINT is one line on standard error, and 130.
    """
    _take_output()
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except _OutputError as error:
        _forget_output()
        if error.errno == errno.EPIPE:
            return READER_GONE
        return _say(f"cannot write to standard output: {error.strerror}", NOT_WRITTEN)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)


def _take_output() -> None:
    """Python's standard output gets a descriptor of its own, and descriptor 1 becomes standard error."""
    if not isinstance(sys.stdout, io.TextIOWrapper) or sys.stderr is None:  # closed by who started us
        return
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(own, "w")),
        encoding=sys.stdout.encoding,
        errors="replace",  # a bar that the locale lacks is no reason to lose a plan
        line_buffering=sys.stdout.line_buffering or sys.stdout.write_through,
    )


def _forget_output() -> None:
    """What is still to be written goes nowhere: not even the interpreter's last flush meets the fault again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _say(what: str, status: int) -> int:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"seqpar: {what}", file=sys.stderr)
    return status
