"""The rows of the catalog of linear time-invariant systems."""

from seqpar.layers.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
