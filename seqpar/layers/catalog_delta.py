"""The rows of the catalog of the delta rule: a state and a matrix travel."""

from seqpar.layers.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
