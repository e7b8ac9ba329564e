"""The battery's rows of ``catalog_ssm``: small layers and their oracles."""

from tests.layers.row import Row

ROWS: dict[str, Row] = {}
