"""The user's own model, by the name of a module and of what builds it there."""

import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def user_model(target: str) -> "nn.Module":
    """What ``MODULE:FACTORY`` builds; raises ``ValueError`` with one line for what is no such thing.

    The line names the place where the user's own code failed.
    """
    from torch import nn

    place, _, name = target.partition(":")
    if not name or not all(part.isidentifier() for part in place.split(".")):
        raise ValueError(f"--model is MODULE:FACTORY, such as mymodel:build, got {target!r}")
    sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(place), name, None)
    except Exception as error:
        raise ValueError(f"--model {target}: cannot import {place}: {_said(error)}") from error
    if not callable(factory):
        raise ValueError(f"--model {target}: module {place} has no function or class {name}")
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"--model {target}: {name}() failed: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {target}: {name}() must return a torch module, got {type(model).__name__}")
    _check_takes_a_cut(target, model)
    return model


def _said(error: Exception) -> str:
    """The error, and the last line of the user's own code that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames[1:] if Path(frame.filename).is_relative_to(os.getcwd())]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _check_takes_a_cut(target: str, model: "nn.Module") -> None:
    from seqpar.training.wrap import SequenceParallel

    module = model.module if isinstance(model, SequenceParallel) else model
    takes = inspect.signature(module.forward)
    try:
        takes.bind("tokens", "cut")
    except TypeError:
        kind = type(module).__name__
        raise ValueError(f"--model {target}: {kind}.forward must take (tokens, cut), it takes {takes}") from None
