"""Words that people type: numbers of tokens such as 64K, and names in any case or by their beginning."""

import difflib
import re
from collections.abc import Iterable

_TOKENS = re.compile(r"(\d{1,15})([KM]?)", re.ASCII | re.IGNORECASE)
_SUFFIXES = (("", 1), ("K", 2**10), ("M", 2**20))
_MOST_TOKENS = 10**15


def tokens_of(word: str) -> int:
    """A number of tokens of at least 0: a whole number, with K for 1024 and M for 1024 times that."""
    match = _TOKENS.fullmatch(word.strip())
    found = -1 if match is None else int(match[1]) * dict(_SUFFIXES)[match[2].upper()]
    if not 0 <= found < _MOST_TOKENS:
        raise ValueError(f"expected a whole number of tokens, such as 65536, 64K or 1M, got {shortened(word)}")
    return found


def pick(what: str, name: str, known: Iterable[str]) -> str:
    """The known name that is meant, in any case, whole or by a beginning that no other has.

    Raises ``ValueError`` with all names that there are.
    """
    names, small = tuple(known), name.strip().lower()
    found = [each for each in names if each.lower() == small]
    found = found or [each for each in names if small and each.lower().startswith(small)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{what} {shortened(name)} may be {' or '.join(found)}: say which")
    raise ValueError(f"no {what} {shortened(name)}{did_you_mean(name, names)}; known are {', '.join(names)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` where a known name is close to ``name``, else nothing."""
    small = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name[:100].lower(), list(small), n=1)
    return f", did you mean {small[close[0]]!r}?" if close else ""


def shortened(text: str) -> str:
    """What was given, quoted, and cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
