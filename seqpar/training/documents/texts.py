"""Text files, each a document; and JSON lines, each line one."""

import codecs
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seqpar.training.documents.source import Tokens, digest

_SCANNED = 1 << 24  # bytes looked at together for the ends of lines


class Files:
    """The text of whole files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._sizes = [_size(path) for path in paths]
        self.fingerprint = digest([f"{path.name} {size}" for path, size in zip(paths, self._sizes)])

    def __len__(self) -> int:
        return len(self._paths)

    def text(self, document: int) -> str:
        return _decoded(_bytes(self._paths[document], 0, self._sizes[document]), self._paths[document], 0, True)

    def name(self, document: int) -> str:
        return str(self._paths[document])


class ByteFiles(Files):
    """Whole files, whose bytes are the tokens: lengths are known, and any part is read alone."""

    def length(self, document: int) -> int:
        return self._sizes[document]

    def tokens(self, document: int, start: int, stop: int) -> Tokens:
        path = self._paths[document]
        content = _bytes(path, start, stop)
        _decoded(content, path, start, stop == self._sizes[document])
        return np.frombuffer(content, np.uint8)


class Lines:
    """JSON lines: ``field`` of each line's object, a text or a list of tokens. Blank lines are no documents."""

    def __init__(self, path: Path, field: str) -> None:
        self._path, self._field = path, field
        self._starts, self._stops = _line_ends(path)
        self.fingerprint = digest([path.name, str(_size(path)), str(len(self._starts)), field])

    def __len__(self) -> int:
        return len(self._starts)

    def text(self, document: int) -> str | Tokens:
        try:
            line = json.loads(_bytes(self._path, int(self._starts[document]), int(self._stops[document])))
        except UnicodeDecodeError as error:
            raise _not_utf8(self.name(document), error, 0) from None
        except (ValueError, RecursionError):
            raise ValueError(f"{self.name(document)}: no JSON") from None
        if not isinstance(line, dict) or self._field not in line:
            has = ", ".join(map(repr, line)) if isinstance(line, dict) else f"a {type(line).__name__}"
            raise ValueError(f"{self.name(document)}: expected an object with {self._field!r}, got {has[:200]}")
        return text_or_tokens(line[self._field], self.name(document), self._field)

    def name(self, document: int) -> str:
        return f"{self._path}, document {document + 1} (byte {self._starts[document]})"


def text_or_tokens(value: Any, name: str, field: str) -> str | Tokens:
    """What a field holds; raises ``ValueError`` unless it is a text or whole numbers of at least 0."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | np.ndarray):
        tokens = np.asarray(value)
        if tokens.size == 0:
            return np.zeros(0, np.uint32)
        if tokens.ndim == 1 and tokens.dtype.kind in "iu" and tokens.min() >= 0 and tokens.max() < 2**31:
            return tokens.astype(np.uint32)
    raise ValueError(f"{name}: {field!r} must be a text or a list of tokens, got a {type(value).__name__}")


def _line_ends(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where lines that are not blank begin and end, in bytes."""
    size = _size(path)
    if not size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = []
        for start in range(0, size, _SCANNED):
            part = np.frombuffer(content[start : start + _SCANNED], np.uint8)
            found.append(np.flatnonzero(part == 10) + start)
        stops = np.concatenate(found)
        if not len(stops) or stops[-1] != size - 1:
            stops = np.append(stops, size)
        starts = np.concatenate([[0], stops[:-1] + 1])
        short = np.flatnonzero(stops - starts < 64)  # longer lines are not blank, or are no JSON
        blank = [number for number in short if not content[starts[number] : stops[number]].strip()]
    return np.delete(starts, blank), np.delete(stops, blank)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _bytes(path: Path, start: int, stop: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) != stop - start:
        raise ValueError(f"{path}: is shorter than it was when it was opened")
    return content


def _decoded(content: bytes, path: Path, start: int, last: bool) -> str:
    """The text; a part of a file may begin and end within a character."""
    skip = 0
    while start and skip < min(3, len(content)) and content[skip] & 0xC0 == 0x80:
        skip += 1
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content[skip:], last)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error, start + skip) from None


def _not_utf8(name: str, error: UnicodeDecodeError, start: int) -> ValueError:
    return ValueError(f"{name}: is not UTF-8 at byte {start + error.start} (0x{error.object[error.start]:02x})")
