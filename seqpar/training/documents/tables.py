"""Documents in the rows of Parquet and Arrow files; the package pyarrow is imported only when one is opened."""

import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from seqpar.training.documents.source import Tokens, digest
from seqpar.training.documents.texts import text_or_tokens

_KEPT = 4  # groups of rows of a Parquet file


class Table:
    """One column of a file: texts, or lists of tokens. Arrow files are mapped; of Parquet the last groups of rows are
    kept, so a shuffled order reads a whole group for a document: :func:`write_tokens` first, where that is slow."""

    def __init__(self, path: Path, field: str) -> None:
        self._path, self._field = path, field
        try:
            pyarrow = importlib.import_module("pyarrow")
        except ImportError:
            raise ValueError(f"{path}: reading it needs the package pyarrow: pip install pyarrow") from None
        try:
            self._open(pyarrow, path.suffix == ".parquet")
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0][:200]
            raise ValueError(f"{path}: cannot be read ({reason})") from None
        self.fingerprint = digest([path.name, str(path.stat().st_size), str(len(self)), field])

    def _open(self, pyarrow: Any, parquet: bool) -> None:
        self._file: Any = None
        self._groups: OrderedDict[int, Any] = OrderedDict()
        if parquet:
            self._file = importlib.import_module("pyarrow.parquet").ParquetFile(self._path)
            names = self._file.schema_arrow.names
            sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        else:
            parts = _record_batches(pyarrow, self._path)
            names, sizes = parts[0].schema.names if parts else [self._field], [part.num_rows for part in parts]
            if self._field in names:
                self._groups.update(enumerate(part.column(self._field) for part in parts))
        if self._field not in names:
            raise ValueError(f"{self._path}: has no column {self._field!r}, but {', '.join(map(repr, names))[:200]}")
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def text(self, document: int) -> str | Tokens:
        group = int(np.searchsorted(self._ends, document, side="right"))
        row = document - (int(self._ends[group - 1]) if group else 0)
        value = self._column(group)[row]
        try:
            found = value.values.to_numpy(zero_copy_only=False) if hasattr(value, "values") else value.as_py()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name(document)}: is not UTF-8 at byte {error.start}") from None
        return text_or_tokens(found, self.name(document), self._field)

    def name(self, document: int) -> str:
        return f"{self._path}, row {document + 1}"

    def _column(self, group: int) -> Any:
        found = self._groups.get(group)
        if found is None:
            found = self._file.read_row_group(group, columns=[self._field]).column(0)
            self._groups[group] = found
            if len(self._groups) > _KEPT:
                self._groups.popitem(last=False)
        return found


def _record_batches(pyarrow: Any, path: Path) -> list[Any]:
    """Those of a stream, as ``datasets`` writes it, or of a file of Arrow's."""
    mapped, ipc = pyarrow.memory_map(str(path)), importlib.import_module("pyarrow.ipc")
    try:
        file = ipc.open_file(mapped)
        return [file.get_batch(number) for number in range(file.num_record_batches)]
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        return list(ipc.open_stream(mapped))
