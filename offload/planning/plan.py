"""A swap plan: the fate of each saved tensor of a layer by shares of tokens, what it is predicted to cost, as JSON."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from seqpar.offload.planning.profile import bucket
from seqpar.offload.planning.strategies import LIMITS, STRATEGIES, Fractions

FORMAT = 1
_SUM = 1e-9


@dataclass(frozen=True)
class SwapPlan:
    """What becomes of the activations of ``layers`` layers alike with ``tokens`` on this device.

    ``fractions`` has a name and shares for each saved tensor, in the order of forward; they hold for all layers but
    the last two, which stay in the rounding buffers. ``alpha`` is the uniform share of strategy ``"memo"``, else
    None. Bytes are of one device, ``host_peak_bytes`` with the pool's rounding; seconds are of a whole step's layers.
    ``hides_from_tokens`` is the length of the whole sequence from which nothing is exposed and no matrix product
    computed again, None where there is none. ``binds`` names the limits that are used up.
    """

    strategy: str
    tokens: int
    context_tokens: float
    layers: int
    fractions: tuple[tuple[str, Fractions], ...]
    alpha: float | None
    saved_bytes_per_layer: int
    device_peak_bytes: int
    host_peak_bytes: int
    recompute_seconds: float
    exposed_seconds: float
    step_seconds: float
    hides_from_tokens: int | None
    binds: tuple[str, ...]

    @property
    def bucket(self) -> int:
        """The length bucket that this plan is kept under."""
        return bucket(self.tokens)

    def of(self, name: str) -> Fractions:
        """The shares of one saved tensor."""
        for known, shares in self.fractions:
            if known == name:
                return shares
        raise ValueError(f"no saved tensor {name!r}; there are: {', '.join(known for known, _ in self.fractions)}")

    def to_json(self) -> str:
        """The plan as one line of JSON; the same plan gives the same bytes."""
        content = {"format": FORMAT, **asdict(self)}
        content["fractions"] = [{"name": name, **asdict(shares)} for name, shares in self.fractions]
        return json.dumps(content, allow_nan=False)


def from_json(text: str) -> SwapPlan:
    """The plan that ``to_json`` wrote; raises ``ValueError`` for anything else. It is not checked: see the checker."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not a swap plan, nor JSON: {error}") from None
    if not isinstance(content, dict) or type(content.get("format")) is not int or content.pop("format") != FORMAT:
        raise ValueError(f'this is not a swap plan: expected an object with "format": {FORMAT}')
    row = _exactly("swap plan", content, [name for name, _ in _readers()])
    return SwapPlan(**{name: read(f"{name} of a swap plan", row[name]) for name, read in _readers()})


def _readers() -> Iterator[tuple[str, Callable[[str, Any], Any]]]:
    """The fields of a plan, and how each is read."""
    kinds: dict[Any, Callable[[str, Any], Any]] = {str: _strategy, int: _count, float: _number}
    own = {"fractions": _fractions, "binds": _binds, "alpha": _share_or_none, "hides_from_tokens": _count_or_none}
    for field in fields(SwapPlan):
        yield field.name, own[field.name] if field.name in own else kinds[field.type]


def _exactly(what: str, row: Any, names: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{what}: expected an object, got {row!r:.60}")
    wrong = sorted(set(row) ^ set(names))
    if wrong:
        raise ValueError(f"{what}: missing or unknown: {', '.join(wrong):.80}")
    return row


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{what} is a finite number >= 0, got {value!r:.60}")
    return float(value)


def _share(what: str, value: Any) -> float:
    if _number(what, value) > 1:
        raise ValueError(f"{what} is at most 1, got {value!r:.60}")
    return float(value)


def _share_or_none(what: str, value: Any) -> float | None:
    return None if value is None else _share(what, value)


def _count(what: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} is a whole number >= 0, got {value!r:.60}")
    return value


def _count_or_none(what: str, value: Any) -> int | None:
    return None if value is None else _count(what, value)


def _strategy(what: str, value: Any) -> str:
    if not isinstance(value, str) or value not in STRATEGIES:
        raise ValueError(f"{what} is one of {', '.join(STRATEGIES)}, got {value!r:.60}")
    return value


def _binds(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or value != [name for name in LIMITS if name in value]:
        raise ValueError(f"{what} is a list out of {', '.join(LIMITS)}, in this order, got {value!r:.60}")
    return tuple(value)


def _fractions(what: str, value: Any) -> tuple[tuple[str, Fractions], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} is a list of objects, got {value!r:.60}")
    found = tuple(_named(what, row) for row in value)
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{what} has a tensor twice: {', '.join(names):.80}")
    return found


def _named(what: str, row: Any) -> tuple[str, Fractions]:
    shares = [field.name for field in fields(Fractions)]
    row = _exactly(what, row, ["name", *shares])
    if not isinstance(row["name"], str):
        raise ValueError(f"{what}: a name is text, got {row['name']!r:.60}")
    found = Fractions(*(_share(f"{name} of {row['name']!r}", row[name]) for name in shares))
    if abs(found.keep + found.swap + found.recompute - 1) > _SUM:
        raise ValueError(f"{what}: keep, swap and recompute of {row['name']!r} sum to 1, got {found}")
    return row["name"], found
