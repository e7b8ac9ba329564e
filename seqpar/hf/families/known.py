"""All families."""

from collections.abc import Mapping
from types import MappingProxyType

from seqpar.hf.families import convolution, delta, mamba, mamba2
from seqpar.hf.families.family import Family, Function

FAMILIES: tuple[Family, ...] = (convolution.FAMILY, mamba.FAMILY, mamba2.FAMILY, delta.FAMILY)
FUNCTIONS: Mapping[str, Function] = MappingProxyType({n: f for each in FAMILIES for n, f in each.functions.items()})
METHODS: Mapping[str, Function] = MappingProxyType({n: f for each in FAMILIES for n, f in each.methods.items()})
