"""From a model of transformers to one that the decorator cuts, and back."""

import copy
from typing import Any

from torch import nn

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.hf.fitted import Fitted
from seqpar.hf.measured import EXACT, measured
from seqpar.hf.whole import base_of, layer_kinds, own_modules

_MARK = "_seqpar_cut"


def adapted(module: nn.Module, group: Group, any_type: bool = False) -> Fitted:
    """``module`` made fit for the decorator; its weights, names and methods stay as they are.

    Raises ``ValueError``, the same on every rank, for a ``model_type`` that was not measured or did not come out
    exactly (``any_type`` lets it try: what measures models does), and for a model that is cut already.
    """
    from seqpar.hf.attend import register

    who, model = where(group), base_of(module)
    check_known(who, module, model, any_type)
    if _MARK in vars(model):
        raise ValueError(
            f"{who}: {type(model).__name__} is wrapped already: sequence_parallel wraps a model once; "
            "seqpar.hf.detach(model) gives it back"
        )
    register()
    _own_configs(module)
    vars(model)[_MARK] = True
    return Fitted(module)


def detach(module: nn.Module) -> nn.Module:
    """The model of transformers inside of a wrapped one, as it was; it may be wrapped again."""
    inside: Any = next((part.model for part in module.modules() if isinstance(part, Fitted)), module)
    vars(base_of(inside)).pop(_MARK, None)
    return inside


def check_known(who: str, module: nn.Module, model: Any, any_type: bool) -> None:
    """Raise ``ValueError`` for what is not known to be exact."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(f"{who}: {type(model).__name__} has no language-model head: wrap a model for causal LM")
    for config in getattr(module, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"{who}: {type(config).__name__} puts tokens of its own before a document: not cut")
    if any("_hf_hook" in vars(part) for part in model.modules()):
        raise ValueError(f"{who}: accelerate moves parts of {type(model).__name__} between devices: no device_map")
    kind, row = model.config.model_type, measured().get(model.config.model_type)
    if any_type:
        return
    if row is None or row.in_place != EXACT:
        why = "it was not measured" if row is None else row.why
        raise ValueError(
            f"{who}: models of type {kind!r} ({type(model).__name__}) are not cut: {why}; see seqpar models"
        )
    for name, part in own_modules(model):
        if not {each.__name__ for each in type(part).__mro__} & set(row.modules):
            raise ValueError(f"{who}: {name or 'the model'} is a {type(part).__name__}, not measured in {kind!r}")
    for layers in sorted(layer_kinds(model) - set(row.layers)):
        raise ValueError(f"{who}: the model has layers {layers!r}, which were not measured in {kind!r}")


def _own_configs(model: nn.Module) -> None:
    """Give the model configs that no other model looks at: one of their entries changes for the time of a call."""
    from transformers import PreTrainedConfig

    memo: dict[int, Any] = {}
    for part in model.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, PreTrainedConfig):
                vars(part)[name] = copy.deepcopy(value, memo)
