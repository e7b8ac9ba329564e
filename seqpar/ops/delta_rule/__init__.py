"""The (gated) delta rule on one device, in stages, so that a scan over ranks can travel while it works."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.transition import Transition
from seqpar.ops import problems
from seqpar.ops.choice import use_kernel
from seqpar.ops.delta_rule import reference, stages
from seqpar.ops.selfcheck import worst
from seqpar.ops.stages import Tensors


@dataclass(frozen=True)
class DeltaRule:
    """DeltaNet, Gated DeltaNet and Kimi Delta Attention, as an :class:`~seqpar.ops.stages.Op`.

    ``tokens = (q, k, v, beta, log_decay or None)``, ``shared = ()``; see ``reference.py`` for meaning and shapes.
    The transition is a matrix [b, h, k, k]. It is computed when it is asked for, and only then; so are outgoing states.
    ``impl``: "auto", "reference" (torch) or "triton", which computes fp64 in torch, too.
    """

    scale: float = 1.0
    impl: str = "auto"

    def begin(self, tokens: Tensors, shared: Tensors, starts: tuple[int, ...]) -> Any:
        """The run of these tokens."""
        q, k, v, beta, log_decay = tokens
        assert q is not None and k is not None and v is not None and beta is not None and not shared
        kernels = use_kernel(self.impl, q, check=check) and q.dtype != torch.float64
        return (stages if kernels else reference).begin(q, k, v, beta, log_decay, starts, scale=self.scale)

    def transition(self, run: Any) -> Transition:
        """What the run does to a state that passes through it."""
        return _of(run).transition(run)

    def known(self, shared: Tensors, like: Tensor, tokens: Sequence[int]) -> None:
        """Nothing is known of transitions that depend on the keys."""

    def intra(self, run: Any) -> Any:
        """What needs no incoming state."""
        return _of(run).intra(run)

    def finish(self, run: Any, partial: Any, incoming: Tensor | None) -> Tensor:
        """The output [b, t, h, v]."""
        return _of(run).finish(run, partial, incoming)

    def begin_backward(self, run: Any, d_out: Tensor, incoming: Tensor | None) -> Any:
        """The mirror of a run."""
        return _of(run).begin_backward(run, d_out, incoming)

    def intra_backward(self, run: Any, adjoint: Any) -> Any:
        """What needs no gradient of the final state."""
        return _of(run).intra_backward(run, adjoint)

    def finish_backward(
        self, run: Any, adjoint: Any, partial: Any, d_final: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Gradients of the tokens' tensors; there are no shared ones."""
        return _of(run).finish_backward(run, adjoint, partial, d_final), ()


def check(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of the kernels, over gate kinds and head dims."""
    found = (problem for dim in (64, 128) for problem in problems.delta(DeltaRule, dim))
    return worst(found, device, dtype)


def _of(run: Any) -> ModuleType:
    """Where the stages of a run are."""
    return stages if isinstance(run, stages.Run) else reference
