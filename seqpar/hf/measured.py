"""Which models were measured, and what came out: what is not on this list is not cut. No torch is imported here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

EXACT, REFUSED = "exact", "refused"


@dataclass(frozen=True)
class Row:
    """One ``model_type``. ``in_place``: ``"exact"`` or ``"refused"``, with the largest relative ``error`` of loss,
    logits and gradients, or ``why`` not. ``converted``: the same for a model made of our layers; None if not tried."""

    model_type: str
    in_place: str
    converted: str | None
    error: float | None
    why: str


@cache
def measured() -> Mapping[str, Row]:
    """All rows, by ``model_type``; written by ``python -m bench.models transformers --record``."""
    text = files("seqpar.hf").joinpath("measured.json").read_text()
    return MappingProxyType({row["model_type"]: Row(**row) for row in json.loads(text)["models"]})
