"""What documents are read from: a row of documents, each a row of tokens of which any part can be read."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from seqpar.training.documents.words import Tokenizer

Tokens = NDArray[np.integer]


class Source(Protocol):
    """Documents that are there already, in an order of their own."""

    @property
    def fingerprint(self) -> str:
        """Says whether two sources hold the same documents in the same order; the same on every host."""
        ...

    def __len__(self) -> int: ...

    def length(self, document: int) -> int:
        """How many tokens it has."""
        ...

    def tokens(self, document: int, start: int, stop: int) -> Tokens:
        """Those from ``start`` to ``stop``; raises ``ValueError`` for what cannot be read."""
        ...

    def name(self, document: int) -> str:
        """Where it stands, for messages."""
        ...


class Texts(Protocol):
    """Documents that are text, or tokens already."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def text(self, document: int) -> str | Tokens: ...

    def name(self, document: int) -> str: ...


class Tokenized:
    """Texts as tokens; each is tokenized when it is asked for, and the last ones are kept.

    ``end``: a token that is put behind every document. Lengths are known only once a text is tokenized, and packing
    asks for those of all documents, on every rank: where a tokenizer is slow, :func:`write_tokens` runs it once.
    """

    def __init__(self, texts: Texts, tokenizer: Tokenizer, end: int | None = None, keep: int = 1 << 24) -> None:
        self._texts, self._tokenizer, self._end, self._keep = texts, tokenizer, end, keep
        self._kept: OrderedDict[int, Tokens] = OrderedDict()
        self._held = 0
        self._lengths: dict[int, int] = {}
        self.fingerprint = digest([texts.fingerprint, tokenizer.fingerprint, str(end)])

    def __len__(self) -> int:
        return len(self._texts)

    def length(self, document: int) -> int:
        found = self._lengths.get(document)
        return len(self._all(document)) if found is None else found

    def tokens(self, document: int, start: int, stop: int) -> Tokens:
        return self._all(document)[start:stop]

    def name(self, document: int) -> str:
        return self._texts.name(document)

    def _all(self, document: int) -> Tokens:
        found = self._kept.get(document)
        if found is not None:
            return found
        text = self._texts.text(document)
        found = self._tokenizer.encode(text) if isinstance(text, str) else text
        if self._end is not None:
            found = np.append(found.astype(np.uint32), np.uint32(self._end))
        self._remember(document, found)
        return found

    def _remember(self, document: int, tokens: Tokens) -> None:
        if len(self._lengths) >= 1 << 20:
            self._lengths.clear()
        self._lengths[document] = len(tokens)
        self._kept[document] = tokens
        self._held += len(tokens)
        while self._held > self._keep and len(self._kept) > 1:
            self._held -= len(self._kept.popitem(last=False)[1])


class Joined:
    """Several sources, one behind the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.fingerprint = digest([part.fingerprint for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def length(self, document: int) -> int:
        part, place = self._find(document)
        return part.length(place)

    def tokens(self, document: int, start: int, stop: int) -> Tokens:
        part, place = self._find(document)
        return part.tokens(place, start, stop)

    def name(self, document: int) -> str:
        part, place = self._find(document)
        return part.name(place)

    def _find(self, document: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, document, side="right"))
        return self._parts[number], document - (int(self._ends[number - 1]) if number else 0)


def digest(words: Sequence[str]) -> str:
    """16 hexadecimal digits that depend on every word."""
    return hashlib.blake2b("\0".join(words).encode(), digest_size=8).hexdigest()
