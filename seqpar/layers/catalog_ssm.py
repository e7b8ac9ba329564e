"""The rows of the catalog that scan elementwise: selective and gated state-space models."""

from seqpar.layers.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
