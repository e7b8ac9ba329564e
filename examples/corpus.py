"""Text to train on, read as bytes: the Python standard library, or any files.

The index holds sizes only; the bytes of a sequence are read when its turn comes. The order follows from the seed, so
every rank finds the same sequences without a message.
"""

import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Document:
    """``size`` bytes of a file, from ``start`` on: a whole file, or a part of one that is too long for a step."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class Corpus:
    """Whole files, and the sequences that they are packed into."""

    files: tuple[Document, ...]
    sequences: tuple[tuple[Document, ...], ...]

    def step(self, number: int, count: int) -> list[tuple[Document, ...]]:
        """The ``count`` sequences of a step; after the last sequence the first one comes again."""
        return [self.sequences[place % len(self.sequences)] for place in range(number * count, (number + 1) * count)]


def open_corpus(data: Sequence[str], tokens: int, seed: int, longest: int | None = None) -> Corpus:
    """Pack the files of ``data`` (nothing: the standard library) into sequences of at most ``tokens`` bytes.

    Files of more than ``longest`` bytes are left out.
    Raises ``ValueError`` if a path is not there, cannot be read, or if there are no bytes at all.
    """
    files = index(named_files(data) if data else standard_library())
    if longest is not None:
        files = [file for file in files if file.size <= longest]
    if not any(file.size for file in files):
        raise ValueError(f"--data {' '.join(data)} holds no bytes in {len(files)} files")
    return Corpus(tuple(files), tuple(pack(files, tokens, seed)))


def standard_library() -> list[Path]:
    """The ``.py`` files of the running Python's standard library, in order; no installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    outside = {"site-packages", "dist-packages"}
    return sorted(path for path in root.rglob("*.py") if path.is_file() and not outside & set(path.parts))


def named_files(data: Sequence[str]) -> list[Path]:
    """The files named, and all files below the directories named except hidden ones, in order, each once."""
    found: dict[Path, None] = {}
    for name in data:
        path = Path(name)
        if path.is_dir():
            found.update(dict.fromkeys(sorted(file for file in path.rglob("*") if _counts(file, path))))
        elif path.is_file():
            found[path] = None
        else:
            raise ValueError(f"--data {name}: no such file or directory")
    return list(found)


def _counts(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def index(files: Iterable[Path]) -> list[Document]:
    """The files with their sizes in bytes; nothing is read."""
    return [Document(path, 0, path.stat().st_size) for path in files]


def pack(files: Iterable[Document], tokens: int, seed: int, open_ends: int = 16) -> list[tuple[Document, ...]]:
    """Fill sequences of at most ``tokens`` bytes with shuffled documents; every byte comes once.

    A file longer than a sequence is cut into parts, and each part counts as a document of its own. A document goes to
    the first of the last ``open_ends`` sequences that has room for it, else it begins a new one.
    """
    documents = [part for file in files for part in _parts(file, tokens)]
    random.Random(seed).shuffle(documents)
    sequences: list[list[Document]] = []
    free: list[int] = []
    for document in documents:
        candidates = range(max(0, len(free) - open_ends), len(free))
        place = next((number for number in candidates if document.size <= free[number]), len(free))
        if place == len(free):
            sequences.append([])
            free.append(tokens)
        sequences[place].append(document)
        free[place] -= document.size
    return [tuple(sequence) for sequence in sequences]


def _parts(file: Document, tokens: int) -> list[Document]:
    if file.size <= tokens:
        return [file]
    starts = range(file.start, file.start + file.size, tokens)
    return [Document(file.path, start, min(tokens, file.start + file.size - start)) for start in starts]


def read(sequence: Sequence[Document], device: torch.device | str = "cpu") -> tuple[Tensor, list[int]]:
    """The bytes of a sequence as tokens ``[1, s]`` int64, and the lengths of its documents."""
    content = bytearray()
    for document in sequence:
        content += _read(document)
    tokens = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return tokens.to(device, torch.int64).unsqueeze(0), [document.size for document in sequence]


def _read(document: Document) -> bytes:
    try:
        with document.path.open("rb") as file:
            file.seek(document.start)
            content = file.read(document.size)
    except OSError as error:
        raise ValueError(f"--data {document.path}: cannot be read ({error.strerror})") from error
    if len(content) != document.size:
        raise ValueError(f"--data {document.path}: became shorter while it was read")
    return content
