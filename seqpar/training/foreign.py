"""Models of other libraries: the room that knows a library makes its models fit, and is imported only then.

Rooms below do not import rooms above, so it is named here, as the face names what it loads.
"""

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from seqpar.collectives import Group

ROOMS: Mapping[str, str] = MappingProxyType({"transformers": "seqpar.hf", "peft": "seqpar.hf"})


def fitted(module: nn.Module, group: Group) -> nn.Module:
    """``module``, or what makes a model of another library take ``(tokens, cut)``."""
    for base in type(module).__mro__:
        if (room := ROOMS.get(base.__module__.split(".")[0])) is not None:
            fit: nn.Module = importlib.import_module(room).adapted(module, group)
            return fit
    return module
