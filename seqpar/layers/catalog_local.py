"""The rows of the catalog that look at neighbours, grids, projections or pools."""

from seqpar.layers.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
