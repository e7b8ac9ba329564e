"""Decayed linear attention on one device, in stages, so that a scan over ranks can travel while it works."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.transition import Transition
from seqpar.ops import problems
from seqpar.ops.choice import use_kernel
from seqpar.ops.decayed_linear_attention import reference, stages
from seqpar.ops.selfcheck import worst
from seqpar.ops.stages import Tensors


@dataclass(frozen=True)
class DecayedLinearAttention:
    """``S_t = exp(log_decay_t) S_{t-1} + k_t v_t'`` and ``o_t = scale q_t S_t``, as :class:`seqpar.ops.stages.Op`.

    Tokens: q, k ``[b, t, h, k]``, v ``[b, t, h, v]``, log_decay None, ``[b, t, h]`` or ``[b, t, h, k]``. Shared:
    nothing, or a constant log_decay ``[h]``, whose transitions every rank knows. ``impl``: ``"auto"``, ``"reference"``
    or ``"triton"``, which has no fp64. ``out_dtype``: that of the output (None: of the tokens); sums that may outgrow
    fp16 before they are normalised leave in fp32.
    """

    scale: float = 1.0
    impl: str = "auto"
    out_dtype: torch.dtype | None = None

    def begin(self, tokens: Tensors, shared: Tensors, starts: tuple[int, ...]) -> Any:
        """The run of these tokens."""
        q, k, v, log_decay = tokens
        assert q is not None and k is not None and v is not None
        kernels = use_kernel(self.impl, q, check=check) and q.shape[1] > 0
        log_decay = shared[0] if shared else log_decay
        if not kernels or q.dtype == torch.float64:
            return reference.begin(q, k, v, log_decay, starts, scale=self.scale)
        if self.out_dtype is not None:  # kernels write, and read the gradient of, what has the dtype of the tokens
            q, k, v = (x.to(self.out_dtype) for x in (q, k, v))
        return stages.begin(q, k, v, log_decay, starts, scale=self.scale)

    def transition(self, run: Any) -> Transition | None:
        """What the run does to a state that passes through it."""
        return None if run.log_decay_total is None else Transition(run.log_decay_total)

    def known(self, shared: Tensors, like: Tensor, tokens: Sequence[int]) -> Sequence[Transition] | None:
        """A constant decay, as often as there are tokens."""
        if not shared or shared[0] is None:
            return None
        per_token = shared[0].to(like.dtype).view(1, -1, 1, 1)
        return [Transition(per_token * count) for count in tokens]

    def intra(self, run: Any) -> Any:
        """What needs no incoming state."""
        return _of(run).intra(run)

    def finish(self, run: Any, partial: Any, incoming: Tensor | None) -> Tensor:
        """The output [b, t, h, v]."""
        if isinstance(run, stages.Run):
            return stages.finish(run, partial, incoming)
        return reference.finish(run, partial, incoming, self.out_dtype)

    def begin_backward(self, run: Any, d_out: Tensor, incoming: Tensor | None) -> Any:
        """The mirror of a run."""
        return _of(run).begin_backward(run, d_out, incoming)

    def intra_backward(self, run: Any, adjoint: Any) -> Any:
        """What needs no gradient of the final state."""
        return _of(run).intra_backward(run, adjoint)

    def finish_backward(
        self, run: Any, adjoint: Any, partial: Any, d_final: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Gradients of the tokens' tensors, and of a constant log_decay."""
        dq, dk, dv, d_decay = _of(run).finish_backward(run, adjoint, partial, d_final)
        if run.log_decay is not None and run.log_decay.dim() == 1:
            return (dq, dk, dv, None), (d_decay,)
        return (dq, dk, dv, d_decay), ()


def check(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of the kernels, over decay kinds and head dims."""
    found = (problem for dim in (64, 128) for problem in problems.decayed(DecayedLinearAttention, dim))
    return worst(found, device, dtype)


def _of(run: Any) -> ModuleType:
    """Where the stages of a run are."""
    return stages if isinstance(run, stages.Run) else reference
