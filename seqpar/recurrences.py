"""The linear recurrences that layers call, each a few lines around :func:`seqpar.recurrence.recur`."""

from typing import Any

from torch import Tensor

from collectives import Group
from collectives.group import where
from seqpar.exchanged import Slot
from seqpar.ops.decayed_linear_attention import DecayedLinearAttention
from seqpar.recurrence import recur
from seqpar.shard import Shard


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shard: Shard,
    group: Group,
    log_decay: Tensor | None = None,
    scan: str = "all_gather",
    backwards: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    scale: float = 1.0,
    slot: Slot | None = None,
    impl: str = "auto",
) -> Any:
    """Linear attention with decay: ``S_t = exp(log_decay_t) S_(t-1) + k_t v_t'``, ``o_t = scale q_t S_t``.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout and scan. The state
    starts at zero in every document.

    Shapes: ``q, k [b, t, h, k]``, ``v [b, t, h, v]`` with ``t`` my tokens; returns ``[b, t, h, v]``, dtype of ``q``.
    ``log_decay``: None, ``[h]`` (retention, Lightning), ``[b, t, h]`` or ``[b, t, h, k]`` (GLA), at most 0.
    ``scan``: ``"all_gather"`` (LASP-2, arXiv 2502.07563), ``"all_scan"`` (ZeCO, arXiv 2507.01004), ``"ring"`` (LASP-1,
    arXiv 2404.02882) or ``"doubling"``. States are fp32 (fp64 for fp64). ``impl``: ``"auto"``, ``"reference"`` (torch)
    or ``"triton"``. ``backwards``, ``initial_state [b, h, k, v]``, ``return_final_state`` and ``slot``: as in
    :func:`seqpar.recurrence.recur`.
    Raises ``ValueError`` before the first message if shapes, dtypes or options do not fit.
    """
    _check_heads(q, k, v, group)
    if log_decay is not None and log_decay.shape not in (q.shape[2:3], q.shape[:3], q.shape):
        raise ValueError(
            f"{where(group)}: log_decay must be [h], [b, t, h] or [b, t, h, k], got {list(log_decay.shape)}"
        )
    _check_state(initial_state, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]), group)
    constant = log_decay is not None and log_decay.dim() == 1
    return recur(
        DecayedLinearAttention(scale, impl),
        (q, k, v, None if constant else log_decay),
        (log_decay,) if constant else (),
        shard=shard,
        group=group,
        scan=scan,
        backwards=backwards,
        initial_state=initial_state,
        return_final_state=return_final_state,
        slot=slot,
    )


def _check_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"{where(group)}: q and k must be [b, t, h, k] and v [b, t, h, v], got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{where(group)}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _check_state(state: Tensor | None, shape: tuple[int, ...], group: Group) -> None:
    if state is not None and state.shape != shape:
        raise ValueError(f"{where(group)}: initial_state must be {list(shape)}, got {list(state.shape)}")
