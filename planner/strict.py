"""From JSON to frozen dataclasses, strictly: exactly the fields, of the types they name, or one ``ValueError``."""

import json
import math
from collections.abc import Mapping
from typing import Any


def read_object(text: str, what: str, format_: int) -> dict[str, Any]:
    """The object that ``text`` holds, without its ``"format"``; raises ``ValueError`` unless that is ``format_``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}") from None
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] != format_:
        raise ValueError(f'this is not a {what}: expected an object with "format": {format_}')
    return {key: value for key, value in content.items() if key != "format"}


def rows(what: str, row: Any, key: str) -> list[Any]:
    """The list that ``row`` has under ``key``."""
    if not isinstance(row, Mapping) or not isinstance(row.get(key), list):
        raise ValueError(f"{what}: expected a list named {key!r}")
    found: list[Any] = row[key]
    return found


def build(what: str, kind: Any, row: Any) -> Any:
    """A dataclass from an object with exactly its fields, of the types it names; floats may be whole, and are finite.

    ``what`` begins the error, which names the field.
    """
    fields = {name: part for name, part in kind.__dataclass_fields__.items() if part.compare}
    if not isinstance(row, Mapping) or set(row) != set(fields):
        have = sorted(set(row) ^ set(fields)) if isinstance(row, Mapping) else row
        raise ValueError(f"{what}: missing or unknown in {kind.__name__}: {have!r:.80}")
    for name, part in fields.items():
        expected: Any = {int: int, str: str, float: (int, float)}.get(part.type, tuple)
        value = row[name]
        fits = isinstance(value, expected) and not isinstance(value, bool)
        if not fits or (part.type is float and not _is_finite(value)):
            raise ValueError(f"{what}: {name} of {kind.__name__} cannot be {value!r:.60}")
    return kind(**{name: float(row[name]) if part.type is float else row[name] for name, part in fields.items()})


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False
