"""Reading document lengths from a file or standard input: whole numbers, one a line or with commas between."""

import sys
from collections.abc import Iterator
from pathlib import Path

_MOST_BYTES = 64 * 2**20


def read_lengths(source: str) -> tuple[int, ...]:
    """The lengths in a file, or on standard input for ``-``; ``ValueError`` says which line is wrong."""
    name = "standard input" if source == "-" else source
    lengths = tuple(_numbers(_text(source), name))
    if not lengths:
        raise ValueError(f"{name} is empty: expected document lengths, whole numbers of tokens, one a line")
    return lengths


def _text(source: str) -> str:
    if source == "-":
        text = sys.stdin.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"standard input is larger than {_MOST_BYTES >> 20} MiB: give one batch of lengths")
        return text
    path = Path(source)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{source} is larger than {_MOST_BYTES >> 20} MiB: give one batch of lengths")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not text: expected whole numbers, one a line") from None


def _numbers(text: str, name: str) -> Iterator[int]:
    for number, line in enumerate(text.splitlines(), start=1):
        for word in line.replace(",", " ").split():
            if not (word.isascii() and word.isdigit() and len(word) < 16 and int(word) > 0):
                raise ValueError(
                    f"{name}, line {number}: expected a whole number of tokens, at least 1, got {word[:40]!r}"
                )
            yield int(word)
