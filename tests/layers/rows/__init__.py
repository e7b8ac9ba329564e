"""Every row of the catalog as the battery runs it: a small layer, its oracle, and what to call it."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.layers.rows import (
    rows_affine,
    rows_decay,
    rows_delta,
    rows_feature,
    rows_local,
    rows_lti,
    rows_memory,
    rows_recurrent,
    rows_ssm,
)
from tests.layers.rows.row import Row

FAMILIES = (
    rows_decay, rows_feature, rows_affine, rows_delta, rows_ssm, rows_lti, rows_local, rows_recurrent, rows_memory,
)  # fmt: skip
ROWS: dict[str, Row] = {name: row for family in FAMILIES for name, row in family.ROWS.items()}


def listed(names: Iterable[str]) -> list[Any]:
    """Names as parameters of tests; those of nightly rows are marked."""
    return [pytest.param(name, marks=pytest.mark.nightly) if ROWS[name].nightly else name for name in names]
