"""Decayed linear attention on one device, in stages, so that a scan over ranks can travel while it works."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from collectives.transition import Transition
from seqpar.ops.decayed_linear_attention import reference
from seqpar.ops.stages import Tensors


@dataclass(frozen=True)
class DecayedLinearAttention:
    """``S_t = exp(log_decay_t) S_{t-1} + k_t v_t'`` and ``o_t = scale q_t S_t``, as :class:`seqpar.ops.stages.Op`.

    Tokens: q, k ``[b, t, h, k]``, v ``[b, t, h, v]``, log_decay None, ``[b, t, h]`` or ``[b, t, h, k]``. Shared: nothing,
    or a constant log_decay ``[h]``, whose transitions every rank knows. ``impl``: ``"auto"``, ``"reference"`` or
    ``"triton"``.
    """

    scale: float = 1.0
    impl: str = "auto"

    def begin(self, tokens: Tensors, shared: Tensors, starts: tuple[int, ...]) -> reference.Run:
        q, k, v, log_decay = tokens
        assert q is not None and k is not None and v is not None
        return reference.begin(q, k, v, shared[0] if shared else log_decay, starts, scale=self.scale)

    def transition(self, run: reference.Run) -> Transition | None:
        return None if run.log_decay_total is None else Transition(run.log_decay_total)

    def known(self, shared: Tensors, like: Tensor, tokens: Sequence[int]) -> Sequence[Transition] | None:
        if not shared or shared[0] is None:
            return None
        per_token = shared[0].to(like.dtype).view(1, -1, 1, 1)
        return [Transition(per_token * count) for count in tokens]

    def intra(self, run: reference.Run) -> Tensor:
        return reference.intra(run)

    def finish(self, run: reference.Run, partial: Tensor, incoming: Tensor | None) -> Tensor:
        return reference.finish(run, partial, incoming)

    def begin_backward(self, run: reference.Run, d_out: Tensor, incoming: Tensor | None) -> reference.Adjoint:
        return reference.begin_backward(run, d_out, incoming)

    def intra_backward(self, run: reference.Run, adjoint: reference.Adjoint) -> reference.IntraGradients:
        return reference.intra_backward(run, adjoint)

    def finish_backward(
        self, run: Any, adjoint: Any, partial: Any, d_final: Tensor | None
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        dq, dk, dv, d_decay = reference.finish_backward(run, adjoint, partial, d_final)
        if run.log_decay is not None and run.log_decay.dim() == 1:
            return (dq, dk, dv, None), (d_decay,)
        return (dq, dk, dv, d_decay), ()
