"""The rows of the catalog whose features, normalisers or prefixes make more of linear attention."""

from seqpar.layers.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
