"""From paths to a source: what a file holds is told by the end of its name."""

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from seqpar.training.documents.source import Joined, Source, Tokenized
from seqpar.training.documents.tables import Table
from seqpar.training.documents.texts import ByteFiles, Files, Lines
from seqpar.training.documents.token_file import open_megatron, open_tokens
from seqpar.training.documents.words import Bytes, Tokenizer

_KINDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".parquet": "table", ".arrow": "table", ".feather": "table",
    ".tokens": "tokens", ".idx": "megatron",
}  # fmt: skip


def open_source(
    paths: Sequence[str | Path], *, tokenizer: Tokenizer | None = None, field: str = "text", end: int | None = None
) -> Source:
    """The documents in files and in all files below folders, in the order of their names.

    ``.jsonl`` and ``.ndjson``: ``field`` of each line; ``.parquet``, ``.arrow`` and ``.feather``: a column of that name
    (the package pyarrow reads them; a folder that ``datasets`` saved is known as one); ``.tokens``: what
    :func:`write_tokens` wrote; ``.idx``: Megatron's, with its ``.bin`` beside it; every other file is one document of
    text in UTF-8, unless it stands in a folder that has files of the other kinds. A field may hold a list of tokens
    instead of a text. Hidden files are left out.

    ``tokenizer``: default bytes. ``end``: a token behind every document that is text, as ``<eos>``. Raises
    ``ValueError`` for paths that are not there or cannot be read, and where there is no document at all.
    """
    found = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
    words = tokenizer or Bytes()
    parts = [part for kind, files in groupby(found, _kind) for part in _opened(kind, list(files), words, field, end)]
    if not sum(map(len, parts)):
        raise ValueError(f"{', '.join(map(str, paths)) or 'nothing'}: no documents in {len(found)} files")
    return parts[0] if len(parts) == 1 else Joined(parts)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if _counts(file, path)]
        return _saved(path) or [file for file in inside if _kind(file) != "text"] or inside
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return [path]


def _counts(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and not (file.suffix == ".bin" and file.with_suffix(".idx").exists())


def _saved(folder: Path) -> list[Path]:
    """The files of a folder that ``datasets`` saved, in its order; none, if it is another folder."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return [folder / each["filename"] for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _kind(file: Path) -> str:
    return _KINDS.get(file.suffix.lower(), "text")


def _opened(kind: str, files: list[Path], words: Tokenizer, field: str, end: int | None) -> list[Source]:
    if kind == "text":
        as_bytes = isinstance(words, Bytes) and end is None
        return [ByteFiles(files)] if as_bytes else [Tokenized(Files(files), words, end)]
    openers: dict[str, Callable[[Path], Source]] = {
        "lines": lambda file: Tokenized(Lines(file, field), words, end),
        "table": lambda file: Tokenized(Table(file, field), words, end),
        "tokens": open_tokens,
        "megatron": open_megatron,
    }
    return [openers[kind](file) for file in files]
