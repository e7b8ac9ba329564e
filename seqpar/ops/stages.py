"""The contract of every recurrence on one device: stages, between which a scan over ranks can travel.

A run is some consecutive tokens. They do one affine thing to a state that passes through them, so the scan needs two
things of a run, its outgoing state and its transition ``T``; the caller puts in what other ranks hold:

    final state           = T incoming * (not reset) + run.outgoing
    gradient of incoming  = T^H d_final * (not reset) + adjoint.outgoing

No one differentiates through ``T`` by hand: an op gives the gradients of all its inputs from the incoming state and the
gradient of the final one.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from seqpar.collectives.transition import Transition

Tensors = tuple[Tensor | None, ...]


class Run(Protocol):
    """The tokens of one run. ``outgoing``: the state that leaves if none enters; ``reset``: a document starts here."""

    @property
    def outgoing(self) -> Tensor: ...

    @property
    def reset(self) -> bool: ...


class Adjoint(Protocol):
    """The mirror of a run. ``outgoing``: the gradient of the incoming state if that of the final one is zero."""

    @property
    def outgoing(self) -> Tensor: ...


class Op(Protocol):
    """A recurrence in stages.

    ``tokens``: what has tokens, each ``[b, t, ...]`` or None. ``shared``: what all tokens share (constants, parameters)
    and every rank has whole. ``starts``: the rows at which a document starts, ascending; those before the first
    continue the document that the incoming state belongs to. States are ``[..., k, v]`` in fp32, or fp64 for fp64.
    """

    @property
    def impl(self) -> str:
        """``"auto"``, ``"reference"`` (torch) or ``"triton"``."""
        ...

    def begin(self, tokens: Tensors, shared: Tensors, starts: tuple[int, ...]) -> Any:
        """The :class:`Run` of these tokens."""
        ...

    def transition(self, run: Any) -> Transition | None:
        """What the run does to a state that passes through it; None: nothing."""
        ...

    def known(self, shared: Tensors, like: Tensor, tokens: Sequence[int]) -> Sequence[Transition] | None:
        """Transitions of runs of so many tokens, if they follow from ``shared`` alone, and so need not travel."""
        ...

    def intra(self, run: Any) -> Any:
        """Whatever needs no incoming state: computed while the scan travels."""
        ...

    def finish(self, run: Any, partial: Any, incoming: Tensor | None) -> Tensor:
        """The output ``[b, t, ...]``. ``partial`` is what :meth:`intra` gave, and is used up."""
        ...

    def begin_backward(self, run: Any, d_out: Tensor, incoming: Tensor | None) -> Any:
        """The :class:`Adjoint` of a run."""
        ...

    def intra_backward(self, run: Any, adjoint: Any) -> Any:
        """Whatever needs no gradient of the final state."""
        ...

    def finish_backward(
        self, run: Any, adjoint: Any, partial: Any, d_final: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Gradients of the tokens' tensors, and of the shared ones."""
        ...


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of states, gates and sums over tokens of ``dtype``: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
