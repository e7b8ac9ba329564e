"""From text to tokens: bytes, or a tokenizer from a file."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What makes tokens of text."""

    @property
    def vocabulary(self) -> int:
        """All tokens are below."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> NDArray[np.integer]: ...


class Bytes:
    """The bytes of the text in UTF-8."""

    vocabulary = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> NDArray[np.integer]:
        try:
            return np.frombuffer(text.encode(), np.uint8)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a text holds half a character, {error.object[error.start]!a}, at {error.start}"
            ) from None


class FromFile:
    """A ``tokenizer.json`` of the package ``tokenizers``, as every fast tokenizer of transformers is saved."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Words
        except ImportError:
            raise ValueError(
                f"{path}: reading a tokenizer needs the package tokenizers: pip install tokenizers"
            ) from None
        try:
            content = path.read_bytes()
            self._words: Any = Words.from_buffer(content)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # whatever the package raises for a file that is none
            raise ValueError(f"{path}: no tokenizer.json: {str(error)[:200]}") from None
        self._words.no_truncation()
        self._words.no_padding()
        self.vocabulary: int = self._words.get_vocab_size()
        self.fingerprint = hashlib.blake2b(content, digest_size=8).hexdigest()

    def encode(self, text: str) -> NDArray[np.integer]:
        return np.asarray(self._words.encode(text, add_special_tokens=False).ids, np.uint32)


def open_tokenizer(path: str | Path | None) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json`` or in a folder that has one; None: bytes are the tokens.

    Special tokens are not added. Raises ``ValueError`` for a file that cannot be read or is no tokenizer.
    """
    if path is None:
        return Bytes()
    file = Path(path)
    return FromFile(file / "tokenizer.json" if file.is_dir() else file)
