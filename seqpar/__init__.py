"""Long sequences, cut over many GPUs, trained to the same numbers as one device.

What is named here is what users import. Names are loaded when they are first asked for, so that ``seqpar plan`` and
every ``--help`` start without torch.
"""

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpar.collectives import connect as connect
    from seqpar.collectives import disconnect as disconnect
    from seqpar.collectives import group_of as group_of
    from seqpar.collectives import run_ranks as run_ranks
    from seqpar.crossing.attention import attention as attention
    from seqpar.crossing.convolution import causal_conv as causal_conv
    from seqpar.crossing.convolution import grid_conv as grid_conv
    from seqpar.crossing.convolution import symmetric_conv as symmetric_conv
    from seqpar.crossing.convolution import token_shift as token_shift
    from seqpar.crossing.recurrences import delta_rule as delta_rule
    from seqpar.crossing.recurrences import diagonal_scan as diagonal_scan
    from seqpar.crossing.recurrences import linear_attention as linear_attention
    from seqpar.crossing.recurrences import linear_system as linear_system
    from seqpar.crossing.recurrences import selective_scan as selective_scan
    from seqpar.ops.softmax_block.scores import Scores as Scores
    from seqpar.sharding.cut import Cut as Cut
    from seqpar.sharding.shard import Shard as Shard
    from seqpar.sharding.states import States as States
    from seqpar.training.execute import run_plan as run_plan
    from seqpar.training.loss import next_token_loss as next_token_loss
    from seqpar.training.plans import plan_ahead as plan_ahead
    from seqpar.training.wrap import sequence_parallel as sequence_parallel
    from seqpar.verification.verify import verify as verify

_ROOMS = ("collectives", "layers", "models", "offload", "planner")
_PLACES = MappingProxyType(
    {
        "collectives": "connect disconnect group_of run_ranks",
        "crossing.attention": "attention",
        "crossing.convolution": "causal_conv grid_conv symmetric_conv token_shift",
        "crossing.recurrences": "delta_rule diagonal_scan linear_attention linear_system selective_scan",
        "ops.softmax_block.scores": "Scores",
        "sharding.cut": "Cut",
        "sharding.shard": "Shard",
        "sharding.states": "States",
        "training.execute": "run_plan",
        "training.loss": "next_token_loss",
        "training.plans": "plan_ahead",
        "training.wrap": "sequence_parallel",
        "verification.verify": "verify",
    }
)
_PLACE_OF = MappingProxyType({name: place for place, names in _PLACES.items() for name in names.split()})
__all__ = [*_ROOMS, *_PLACE_OF]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"seqpar.{name}")
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'seqpar' has no attribute {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(f"seqpar.{_PLACE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
