"""Which models were measured, and what came out: what is not on this list is not cut. No torch is imported here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

EXACT, REFUSED = "exact", "refused"


@dataclass(frozen=True)
class Row:
    """One ``model_type``. ``in_place``: ``"exact"`` or ``"refused"``, with the largest relative ``error`` of loss,
    logits and gradients, or ``why`` not. ``converted``: the same for a model made of our layers; None if not tried.
    ``modules``, ``layers``: the classes and the kinds of layers that were measured."""

    model_type: str
    in_place: str
    converted: str | None
    error: float | None
    why: str
    modules: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


def _row(row: Mapping[str, Any]) -> Row:
    listed = {name: tuple(row.get(name, ())) for name in ("modules", "layers")}
    converted = _converted().get(row["model_type"], {}).get("converted")
    return Row(row["model_type"], row["in_place"], converted, row["error"], row["why"], **listed)


@cache
def _converted() -> Mapping[str, Any]:
    """Written by ``python -m bench.models.hf.converted``."""
    found: dict[str, Any] = json.loads(files("seqpar.hf").joinpath("converted.json").read_text())
    return MappingProxyType(found)


@cache
def measured() -> Mapping[str, Row]:
    """All rows, by ``model_type``; written by ``python -m bench.models --record``."""
    text = files("seqpar.hf").joinpath("measured.json").read_text()
    return MappingProxyType({row["model_type"]: _row(row) for row in json.loads(text)["models"]})
