"""Models of transformers, cut in place: weights, names and files stay the user's.

``sequence_parallel(model)`` finds its way here by itself. What is named here is loaded when it is first asked for;
transformers is imported when a model of it is given, and not before.
"""

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpar.hf.adapt import adapted as adapted
    from seqpar.hf.adapt import detach as detach
    from seqpar.hf.converting.convert import load as load
    from seqpar.hf.converting.convert import save as save
    from seqpar.hf.exact import Exact as Exact
    from seqpar.hf.guard import compare_with_alone as compare_with_alone
    from seqpar.hf.inputs import packed as packed
    from seqpar.hf.trainer import TrainerMixin as TrainerMixin

_PLACE_OF = MappingProxyType(
    {
        "adapted": "adapt",
        "detach": "adapt",
        "Exact": "exact",
        "load": "converting.convert",
        "packed": "inputs",
        "save": "converting.convert",
        "TrainerMixin": "trainer",
        "compare_with_alone": "guard",
    }
)
__all__ = [*_PLACE_OF, "Trainer"]


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from transformers import Trainer

        from seqpar.hf.trainer import TrainerMixin

        return type("Trainer", (TrainerMixin, Trainer), {})
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'seqpar.hf' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"seqpar.hf.{_PLACE_OF[name]}"), name)
