"""Every token mixer in one table: its paper, what crosses a cut, how many bytes, and what it supports.

README, ``seqpar layers``, the decoder, the planner's prices and the battery of tests all read this table: a layer that
is not in it does not exist, and one that is in it is tested like all the others.
"""

from collections.abc import Mapping
from types import MappingProxyType

from seqpar.layers.attention import catalog_softmax
from seqpar.layers.delta import catalog_delta
from seqpar.layers.entry import Entry
from seqpar.layers.linear import catalog_affine, catalog_decay, catalog_feature
from seqpar.layers.local import catalog_local
from seqpar.layers.memory import catalog_memory
from seqpar.layers.recurrent import catalog_recurrent
from seqpar.layers.ssm import catalog_lti, catalog_ssm

FAMILIES = (
    catalog_softmax,
    catalog_decay,
    catalog_feature,
    catalog_affine,
    catalog_delta,
    catalog_ssm,
    catalog_lti,
    catalog_local,
    catalog_recurrent,
    catalog_memory,
)
CATALOG: Mapping[str, Entry] = MappingProxyType({entry.name: entry for family in FAMILIES for entry in family.ENTRIES})


def find(name: str) -> Entry:
    """The row called ``name``; ``ValueError``, with all names, if there is none."""
    if name not in CATALOG:
        raise ValueError(f"there is no layer {name!r}; the catalog has {', '.join(CATALOG)}")
    return CATALOG[name]
