"""Placement problems as CSV: one buffer a line, in the columns of the public minimalloc problems."""

import csv
from pathlib import Path

from seqpar.offload.placement.buffers import Buffer

COLUMNS = ("id", "lower", "upper", "size")
MOST_BYTES = 64 * 2**20


def read_placement_file(path: str | Path) -> tuple[Buffer, ...]:
    """The buffers of a CSV file with the columns id, lower, upper and size, in any order.

    Lives are half-open, [lower, upper); sizes are bytes. Raises ``ValueError`` with the file and the line for a file
    that cannot be read, is empty, lacks a column or comes with a line that is no buffer, and for an id that comes
    twice.
    """
    text = _text(Path(path))
    try:
        # Values never hold line breaks, so a row is a line.
        return _buffers(list(csv.reader(text.splitlines(), strict=True)), str(path))
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from error


def _text(path: Path) -> str:
    """The text of a file of at most ``MOST_BYTES``: of one without end no more than that is read."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{path}: larger than {MOST_BYTES >> 20} MiB; expected a line for each buffer")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ValueError(f"{path}: cannot read: {reason}") from error


def _buffers(rows: list[list[str]], path: str) -> tuple[Buffer, ...]:
    header = rows[0] if rows else []
    if not any(name.strip() for name in header):
        raise ValueError(f"{path}: empty; expected a line {','.join(COLUMNS)} and a line for each buffer")
    names = [name.strip() for name in header]
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise ValueError(f"{path}:1: no column {', '.join(missing)}; expected {','.join(COLUMNS)}")
    columns = [names.index(column) for column in COLUMNS]
    found: dict[str, Buffer] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"{path}:{line}"
        if len(row) < len(names):
            raise ValueError(f"{where}: {len(row)} values, expected {len(names)}")
        buffer = _buffer([row[column].strip() for column in columns], where)
        if buffer.id in found:
            raise ValueError(f"{where}: buffer {buffer.id} comes twice; every id must be different")
        found[buffer.id] = buffer
    if not found:
        raise ValueError(f"{path}: no buffers; expected a line for each after the header")
    return tuple(found.values())


def _buffer(cells: list[str], where: str) -> Buffer:
    if not cells[0]:
        raise ValueError(f"{where}: no id")
    lower, upper, size = (_integer(cell, column, where) for cell, column in zip(cells[1:], COLUMNS[1:]))
    try:
        return Buffer(id=cells[0], size=size, birth=lower, death=upper)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _integer(cell: str, column: str, where: str) -> int:
    digits = cell[1:] if cell[:1] == "-" else cell
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        shown = cell if len(cell) <= 60 else f"{cell[:60]}..."
        raise ValueError(f"{where}: {column} is {shown!r}; expected a whole number of at most 18 digits")
    return int(cell)
