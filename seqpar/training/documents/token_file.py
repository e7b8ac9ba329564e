"""Tokens in a file that is mapped into memory: one file of ours, or the pair of files that Megatron writes.

Ours (``.tokens``), little-endian: 8 bytes ``seqpar\\x00\\x01``; three 64-bit numbers, the bytes of a token (2 or 4),
the number of documents and that of tokens; 8 bytes that depend on every token and end; the tokens; from the next
multiple of 8 bytes on where each document ends, 64-bit numbers.
"""

import hashlib
import os
import secrets
import struct
from pathlib import Path

import numpy as np

from seqpar.training.documents.source import Source, Tokens, digest

_MAGIC, _HEADER = b"seqpar\x00\x01", struct.Struct("<8sQQQ8s")
_MEGATRON, _MEGATRON_HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")
_MEGATRON_KINDS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class TokenFile:
    """Documents one behind the other in one array; nothing is read before it is asked for."""

    def __init__(self, path: Path, tokens: Tokens, ends: np.ndarray, fingerprint: str) -> None:
        self._path, self._tokens, self._ends = path, tokens, ends
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._ends)

    def length(self, document: int) -> int:
        return int(self._ends[document]) - self._begin(document)

    def tokens(self, document: int, start: int, stop: int) -> Tokens:
        begin = self._begin(document)
        return self._tokens[begin + start : begin + stop]

    def name(self, document: int) -> str:
        return f"{self._path}, document {document + 1}"

    def _begin(self, document: int) -> int:
        return int(self._ends[document - 1]) if document else 0


def open_tokens(path: Path) -> TokenFile:
    """A ``.tokens`` file; raises ``ValueError`` for one that is none, or not whole."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"{path}: is no file of tokens, as seqpar.training.documents.write_tokens writes them")
    _, width, documents, num, mark = _HEADER.unpack(header)
    begin = _aligned(_HEADER.size + width * num)
    if width not in (2, 4) or size != begin + 8 * documents:
        raise ValueError(f"{path}: is not whole: {size} bytes for {documents} documents of {num} tokens together")
    tokens = _mapped(path, f"<u{width}", num, _HEADER.size)
    ends = _mapped(path, "<i8", documents, begin)
    if documents and (ends[-1] != num or (np.diff(ends, prepend=0) < 0).any()):
        raise ValueError(f"{path}: the ends of its documents do not fit its {num} tokens")
    return TokenFile(path, tokens, ends, mark.hex())


def open_megatron(path: Path) -> TokenFile:
    """Megatron's ``NAME.idx`` and ``NAME.bin``: each of its sequences is a document."""
    try:
        index = path.with_suffix(".idx").read_bytes()
    except OSError as error:
        raise ValueError(f"{path.with_suffix('.idx')}: cannot be read ({error.strerror})") from None
    if len(index) < _MEGATRON_HEADER.size or not index.startswith(_MEGATRON):
        raise ValueError(f"{path}: is no index of Megatron's")
    _, version, kind, num, _ = _MEGATRON_HEADER.unpack_from(index)
    if version != 1 or kind not in _MEGATRON_KINDS or len(index) < _MEGATRON_HEADER.size + 12 * num:
        raise ValueError(f"{path}: version {version}, kind {kind} of {num} sequences: not known, or not whole")
    lengths = np.frombuffer(index, "<i4", num, _MEGATRON_HEADER.size).astype(np.int64)
    starts = np.frombuffer(index, "<i8", num, _MEGATRON_HEADER.size + 4 * num)
    dtype, ends = np.dtype(_MEGATRON_KINDS[kind]), np.cumsum(lengths)
    if (starts != (ends - lengths) * dtype.itemsize).any():
        raise ValueError(f"{path}: its sequences do not stand one behind the other")
    content = path.with_suffix(".bin")
    total = int(ends[-1]) if num else 0
    if not content.is_file() or content.stat().st_size != total * dtype.itemsize:
        raise ValueError(f"{content}: must hold {total} tokens of {dtype.itemsize} bytes")
    mark = hashlib.blake2b(index, digest_size=8).hexdigest()
    return TokenFile(content, _mapped(content, _MEGATRON_KINDS[kind], total, 0), ends, digest([path.name, mark]))


def write_tokens(source: Source, path: str | Path) -> int:
    """Write all documents of a source into a ``.tokens`` file, and return the number of tokens.

    A tokenizer then runs once, and not on every rank. Two passes over the source: the first finds the largest token.
    The file is written beside and renamed. Raises ``ValueError`` if it cannot be written.
    """
    num = len(source)
    lengths = np.fromiter((source.length(document) for document in range(num)), np.int64, num)
    most = max((int(_whole(source, d).max()) for d in range(num) if lengths[d]), default=0)
    width, total = 2 if most < 1 << 16 else 4, int(lengths.sum())
    target = Path(path)
    beside = target.with_name(f".{secrets.token_hex(8)}.part")
    mark = hashlib.blake2b(digest_size=8)
    try:
        with beside.open("xb") as file:
            file.seek(_HEADER.size)
            for document in range(num):
                content = _whole(source, document).astype(f"<u{width}").tobytes()
                mark.update(content)
                file.write(content)
            file.seek(_aligned(_HEADER.size + width * total))
            ends = np.cumsum(lengths).astype("<i8").tobytes()
            mark.update(ends)
            file.write(ends)
            file.truncate()
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, width, num, total, mark.digest()))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
    return total


def _whole(source: Source, document: int) -> Tokens:
    return source.tokens(document, 0, source.length(document))


def _mapped(path: Path, dtype: str, num: int, start: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", start, (num,)) if num else np.zeros(0, dtype)


def _aligned(size: int) -> int:
    return -(-size // 8) * 8
