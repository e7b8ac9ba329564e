"""How every command reads its arguments: one parser for counts, sizes, lengths and seconds, and one line of error.

Words are read by the planner's code, which is loaded when the first one is read, and not for ``--help``.
"""

import argparse
from collections.abc import Iterable
from typing import NoReturn

_MOST_DIGITS = 18


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` where a known name is close to ``name``, else nothing."""
    from seqpar.planner.problem import words

    return words.did_you_mean(name, known)


def whole(text: str, least: int = 0) -> int:
    """A whole number of at least ``least``, of a size that a machine can count to."""
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {shortened(text)}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 1."""
    return whole(text, 1)


def size(text: str) -> int:
    """A number of tokens: a whole number, with K for 1024 and M for 1024 times that."""
    from seqpar.planner.problem.words import tokens_of

    try:
        return tokens_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tokens(text: str) -> int:
    """A number of tokens of at least 1, such as 65536, 64K or 1M."""
    found = size(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1 token, such as 65536, 64K or 1M, got {shortened(text)}")
    return found


def lengths(text: str) -> tuple[int, ...]:
    """Tokens of documents with commas between, such as 5,0,17 or 4K,64K."""
    try:
        return tuple(map(size, text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas between, such as 5,0,17 or 4K,64K, got {shortened(text)}"
        ) from None


def counts(text: str) -> tuple[int, ...]:
    """Numbers of tokens of at least 1, with commas between."""
    return tuple(map(tokens, text.split(",")))


def seconds(text: str) -> float:
    """Seconds above 0 and below a day."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 86_400:
        raise argparse.ArgumentTypeError(f"expected seconds above 0 and below a day, got {shortened(text)}")
    return found


def gib(text: str) -> float:
    """GiB above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 2**-20 <= found < 2**20:
        raise argparse.ArgumentTypeError(f"expected GiB above 0, got {shortened(text)}")
    return found


def shortened(text: str) -> str:
    """What was given, quoted, and cut where it is long."""
    from seqpar.planner.problem import words

    return words.shortened(text)
