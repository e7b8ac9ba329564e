"""The linear recurrences that layers call, each a few lines around :func:`seqpar.crossing.recurrence.recur`."""

import math
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.collectives.group import where
from seqpar.crossing.recurrence import recur
from seqpar.ops.decayed_linear_attention import DecayedLinearAttention
from seqpar.ops.delta_rule import DeltaRule
from seqpar.ops.diagonal_scan import DiagonalScan, SelectiveScan
from seqpar.ops.linear_system import LinearSystem
from seqpar.ops.linear_system import check as check_system
from seqpar.ops.stages import state_dtype
from seqpar.sharding.called import called, check_range
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard


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
    out_dtype: torch.dtype | None = None,
    slot: Slot | None = None,
    impl: str = "auto",
) -> Any:
    """Linear attention with decay: ``S_t = exp(log_decay_t) S_(t-1) + k_t v_t'``, ``o_t = scale q_t S_t``.

    Law: the ranks' outputs and gradients, put together, are those of one device, for every layout and scan. The state
    starts at zero in every document.

    Shapes: ``q, k [b, t, h, k]``, ``v [b, t, h, v]`` with ``t`` my tokens; returns ``[b, t, h, v]``, dtype of ``q``,
    or ``out_dtype``: float32 for sums that are normalised afterwards, and would overflow in fp16 before.
    ``log_decay``: None, ``[h]`` (retention, Lightning), ``[b, t, h]`` or ``[b, t, h, k]`` (GLA), at most 0.
    ``scan``: ``"all_gather"`` (LASP-2, arXiv 2502.07563), ``"all_scan"`` (ZeCO, arXiv 2507.01004), ``"ring"`` (LASP-1,
    arXiv 2404.02882) or ``"doubling"``. States are fp32 (fp64 for fp64). ``impl``: ``"auto"``, ``"reference"`` (torch)
    or ``"triton"``. ``backwards``, ``initial_state [b, h, k, v]``, ``return_final_state`` and ``slot``: as in
    :func:`seqpar.crossing.recurrence.recur`.
    Raises ``ValueError`` before the first message if shapes, dtypes or options do not fit.
    """
    options = (scan, backwards, return_final_state, scale, out_dtype)
    called("linear_attention", group, shard, options, q, k, v, log_decay, shared=(initial_state,))
    _check_heads(q, k, v, group)
    if log_decay is not None and log_decay.shape not in (q.shape[2:3], q.shape[:3], q.shape):
        raise ValueError(
            f"{where(group)}: log_decay must be [h], [b, t, h] or [b, t, h, k], got {list(log_decay.shape)}"
        )
    _check_state(initial_state, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]), group)
    check_range("log_decay", log_decay, -math.inf, 0.0, group)
    constant = log_decay is not None and log_decay.dim() == 1
    if out_dtype not in (None, q.dtype, state_dtype(q.dtype)):
        raise ValueError(f"{where(group)}: out_dtype must be {q.dtype} or {state_dtype(q.dtype)}, got {out_dtype}")
    return recur(
        DecayedLinearAttention(scale, impl, None if out_dtype == q.dtype else out_dtype),
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


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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
    """The gated delta rule: ``S_t = (I - beta_t k_t k_t') Diag(exp(log_decay_t)) S_(t-1) + beta_t k_t v_t'`` and
    ``o_t = scale q_t S_t``.

    Law, shapes and the other arguments as :func:`linear_attention`; ``beta [b, t, h]`` from 0 to 2, keys of length one.
    ``log_decay``: None (DeltaNet, arXiv 2406.06484), ``[b, t, h]`` (Gated DeltaNet, arXiv 2412.06464) or
    ``[b, t, h, k]`` (KDA, arXiv 2510.26692). A matrix ``[b, h, k, k]`` travels with the state, except along a chain
    (``scan="ring"`` or ``"all_scan"``).
    """
    options = (scan, backwards, return_final_state, scale)
    called("delta_rule", group, shard, options, q, k, v, beta, log_decay, shared=(initial_state,))
    _check_heads(q, k, v, group)
    if beta.shape != q.shape[:3]:
        raise ValueError(f"{where(group)}: beta must be {list(q.shape[:3])}, got {list(beta.shape)}")
    if log_decay is not None and log_decay.shape not in (q.shape[:3], q.shape):
        raise ValueError(f"{where(group)}: log_decay must be [b, t, h] or [b, t, h, k], got {list(log_decay.shape)}")
    _check_state(initial_state, (q.shape[0], q.shape[2], q.shape[3], v.shape[3]), group)
    check_range("log_decay", log_decay, -math.inf, 0.0, group)
    check_range("beta", beta, 0.0, 2.0, group)
    return recur(
        DeltaRule(scale, impl),
        (q, k, v, beta, log_decay),
        shard=shard,
        group=group,
        scan=scan,
        backwards=backwards,
        initial_state=initial_state,
        return_final_state=return_final_state,
        slot=slot,
    )


def diagonal_scan(
    x: Tensor,
    log_a: Tensor,
    *,
    shard: Shard,
    group: Group,
    scan: str = "all_gather",
    backwards: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    slot: Slot | None = None,
    impl: str = "auto",
) -> Any:
    """An elementwise recurrence: ``h_t = exp(log_a_t) h_(t-1) + x_t``, real or complex.

    Law and the other arguments as :func:`linear_attention`. ``x [b, t, d]``; ``log_a [b, t, d]``, or ``[d]`` if all
    tokens share it (then it does not travel); its real part is at most 0 and may be ``-inf``. Returns ``[b, t, d]``.
    States are ``[b, 1, d, 1]``.
    """
    options = (scan, backwards, return_final_state)
    called("diagonal_scan", group, shard, options, x, log_a, shared=(initial_state,))
    if x.dim() != 3 or log_a.shape not in (x.shape, x.shape[2:]):
        shapes = f"x {list(x.shape)} and log_a {list(log_a.shape)}"
        raise ValueError(f"{where(group)}: x must be [b, t, d] and log_a the same, or [d], got {shapes}")
    _check_state(initial_state, (x.shape[0], 1, x.shape[2], 1), group)
    constant = log_a.dim() == 1
    return recur(
        DiagonalScan(impl=impl),
        (None if constant else log_a, x),
        (log_a,) if constant else (),
        shard=shard,
        group=group,
        scan=scan,
        backwards=backwards,
        initial_state=initial_state,
        return_final_state=return_final_state,
        slot=slot,
    )


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    shard: Shard,
    group: Group,
    scan: str = "all_gather",
    backwards: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    slot: Slot | None = None,
    impl: str = "auto",
) -> Any:
    """Mamba's scan: ``h_t = exp(delta_t a) h_(t-1) + delta_t b_t u_t`` and ``y_t = c_t h_t`` (arXiv 2312.00752).

    Law and the other arguments as :func:`linear_attention`. ``u, delta [b, t, d]`` (step sizes, at least 0),
    ``a [d, n]`` at most 0, ``b, c [b, t, n]``; returns ``[b, t, d]``. States are ``[b, 1, d, n]``. What a rank does
    to a state follows from the sum of its step sizes, so ``d`` numbers travel with it instead of ``d n``.
    """
    options = (scan, backwards, return_final_state)
    called("selective_scan", group, shard, options, u, delta, b, c, shared=(a, initial_state))
    shapes = f"u {list(u.shape)}, delta {list(delta.shape)}, a {list(a.shape)}, b {list(b.shape)}, c {list(c.shape)}"
    per_token = (*u.shape[:2], a.shape[-1])
    if u.dim() != 3 or u.shape != delta.shape or a.shape[:-1] != u.shape[2:] or not b.shape == c.shape == per_token:
        raise ValueError(f"{where(group)}: u and delta must be [b, t, d], a [d, n], b and c [b, t, n], got {shapes}")
    _check_state(initial_state, (u.shape[0], 1, *a.shape), group)
    return recur(
        SelectiveScan(impl=impl),
        (u, delta, b, c),
        (a,),
        shard=shard,
        group=group,
        scan=scan,
        backwards=backwards,
        initial_state=initial_state,
        return_final_state=return_final_state,
        slot=slot,
    )


def linear_system(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    shard: Shard,
    group: Group,
    scan: str = "all_gather",
    backwards: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    slot: Slot | None = None,
    impl: str = "auto",
) -> Any:
    """A linear time-invariant system: ``h_t = a h_(t-1) + b u_t`` and ``y_t = c h_t``.

    Law and the other arguments as :func:`linear_attention`. ``u [b, t, h, v]``: ``h`` systems, of each ``v`` inputs
    with a state of their own; ``a [h, n, n]``, ``b [h, n]``, ``c [h, q, n]`` (best in fp64, as their powers are) may be
    learned. A complex ``a [h, n / 2]`` is a diagonal matrix, on states of n / 2 real parts and then n / 2 imaginary
    ones. Returns ``[b, t, h, q, v]``. States are ``[b, h, n, v]``, and all that travels. S4 (arXiv 2111.00396), S4D
    (arXiv 2206.11893), LSSL (arXiv 2110.13985) and LMU (NeurIPS 2019) are of this kind. There are torch matmuls only,
    whatever ``impl`` says.
    """
    options = (scan, backwards, return_final_state)
    called("linear_system", group, shard, options, u, shared=(a, b, c, initial_state))
    try:
        check_system(u, a, b, c)
    except ValueError as error:
        raise ValueError(f"{where(group)}: {error}") from None
    _check_state(initial_state, (u.shape[0], *b.shape, u.shape[3]), group)
    return recur(
        LinearSystem(impl),
        (u,),
        (a, b, c),
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
