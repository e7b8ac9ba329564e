"""Short causal convolutions: LFM2's, and those before every recurrence of the Mamba and delta families."""

from types import MappingProxyType
from typing import Any

from torch import Tensor

from seqpar.crossing.here import Here
from seqpar.hf.families.family import Family


def convolve(
    here: Here, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``[b, d, t]`` in and out; ``weight [d, w]``."""
    from transformers.activations import ACT2FN

    act: Any = (lambda x: x) if activation is None else ACT2FN[activation]
    x = hidden_states.transpose(1, 2).to(weight.dtype)
    out: Tensor = act(here.causal_conv(x, weight, bias)).transpose(1, 2).to(hidden_states.dtype)
    return out


FAMILY = Family(MappingProxyType({"causal_conv1d_fn": convolve}))
