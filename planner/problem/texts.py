"""Text from files that may be anything: devices without end, other encodings, folders."""

import sys
from pathlib import Path

MOST_BYTES = 64 * 2**20


def read_text(source: str, name: str, expected: str) -> str:
    """The text of a file, or of standard input for ``-``, of at most ``MOST_BYTES``: no more than that is ever read.

    Raises ``ValueError`` that begins with what is wrong with ``name``.
    """
    if source == "-":
        text = sys.stdin.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise _too_large(name, expected)
        return text
    try:
        with Path(source).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MOST_BYTES:
        raise _too_large(name, expected)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not text: expected {expected}") from None


def _too_large(name: str, expected: str) -> ValueError:
    return ValueError(f"{name} is larger than {MOST_BYTES >> 20} MiB: expected {expected}")
