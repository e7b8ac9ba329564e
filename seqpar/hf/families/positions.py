"""Positions that a model counts by itself: they are those in the document, wherever its tokens are."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family, Function

COUNT = "create_position_ids_from_input_ids"
_COUNTED = (
    "Camembert", "Data2VecText", "Roberta", "RobertaPreLayerNorm", "XLMRoberta", "XLMRobertaXL", "Xmod",
)  # fmt: skip
_LEARNED = ("Bart", "MBart", "PLBart", "Mvp", "Blenderbot", "BlenderbotSmall", "BigBirdPegasus", "TrOCR")
_SINUSOIDAL = ("Marian", "Pegasus", "RoFormer")


def embedded(here: Here, module: Any, input_ids: Any, cache_length: int = 0, position_ids: Any = None) -> Tensor:
    """The class's own embedding of positions that it is given, rather than counts."""
    if cache_length:
        raise ValueError(f"{type(module).__name__} counts from {cache_length}: a cut model has no cache")
    positions = here.positions.to(module.weight.device)
    own: Tensor = type(module).forward(module, input_ids, position_ids=positions)
    return own


def counted(here: Here, module: Any, input_ids: Tensor, padding_idx: int, cache_length: int = 0) -> Tensor:
    """RoBERTa's positions: tokens of the document so far that are not padding, which has a position of its own."""
    mask = input_ids.ne(padding_idx)
    ones = mask.to(torch.float64)[..., None]
    seen = here.diagonal_scan(ones, torch.zeros(1, dtype=torch.float64, device=ones.device))[..., 0]
    return seen.round().long() * mask + padding_idx


METHODS: Mapping[str, Function] = MappingProxyType(
    {f"{name}Embeddings.{COUNT}": counted for name in _COUNTED}
    | {f"{name}LearnedPositionalEmbedding.forward": embedded for name in _LEARNED}
    | {f"{name}SinusoidalPositionalEmbedding.forward": embedded for name in _SINUSOIDAL}
    | {"Data2VecTextForTextEmbeddings." + COUNT: counted}
)
FAMILY = Family(methods=METHODS)
