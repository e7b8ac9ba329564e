"""All families."""

from collections.abc import Mapping
from types import MappingProxyType

from seqpar.hf.families import convolution, delta, eager, inkling, lightning, mamba, mamba2, positions, rg_lru, rwkv
from seqpar.hf.families.family import Family, Function

FAMILIES: tuple[Family, ...] = tuple(
    each.FAMILY for each in (convolution, delta, eager, inkling, lightning, mamba, mamba2, positions, rg_lru, rwkv)
)
FUNCTIONS: Mapping[str, Function] = MappingProxyType({n: f for each in FAMILIES for n, f in each.functions.items()})
METHODS: Mapping[str, Function] = MappingProxyType({n: f for each in FAMILIES for n, f in each.methods.items()})
