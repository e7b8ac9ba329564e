"""Recurrent cells with heads on one device: all steps of a stretch, from a state and to one, with gradients of both.

Law: rows, states and all gradients are those of the loop over tokens, whichever implementation runs.
``reference.py`` is the meaning, ``fused.py`` and its kernels (Triton) are the speed on a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.ops import choice
from seqpar.ops.recurrent_cell import fused, reference
from seqpar.ops.recurrent_cell.reference import KINDS, Tensors
from seqpar.ops.recurrent_cell.selfcheck import check
from seqpar.ops.recurrent_cell.tiles import LARGEST_DIM
from seqpar.ops.stages import state_dtype

__all__ = ["KINDS", "check", "recur", "uses_kernel"]


def recur(
    kind: str,
    driven: Tensor,
    matrix: Tensor,
    inside: Tensor | None,
    state: Sequence[Tensor],
    *,
    narrow: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensors]:
    """Some steps of a cell: its outputs ``[n, t, h, d]`` and the state after them.

    ``kind``: ``"elman"``, ``"gru"``, ``"lstm"`` or ``"slstm"``. ``driven [n, t, h, gates * d]``: what each token adds
    to the gates, biases among it; ``matrix [h, gates * d, d]``: what the last output does; ``inside [h, d]``: of a GRU,
    the bias within the reset gate, else None; ``state``: tensors ``[n, h, d]``, the output first. Rows and states are
    fp32 (fp64 for fp64). ``narrow``: the numbers of ``matrix`` fit into bf16, so that kernels may multiply by them on
    matrix units; what they meet is not rounded.
    ``impl``: ``"auto"``, ``"reference"`` (torch) or ``"triton"``, for heads of up to 128.
    Raises ``ValueError`` for shapes that do not fit, and where kernels cannot run.
    """
    _check(kind, driven, matrix, inside, state)
    dtype = state_dtype(torch.promote_types(driven.dtype, state[0].dtype))
    now = tuple(x.to(dtype) for x in state)
    if not uses_kernel(impl, driven, matrix.shape[2]):
        return reference.recur(
            kind, driven.to(dtype), matrix.to(dtype), None if inside is None else inside.to(dtype), now
        )
    return fused.recur(kind, driven, matrix, inside, now, narrow)


def uses_kernel(impl: str, x: Tensor, dim: int) -> bool:
    """Whether heads of ``dim`` run in the kernels, for tokens like ``x``; raises ``ValueError`` where they cannot."""
    if impl == "triton" and dim > LARGEST_DIM:
        raise ValueError(f'the kernels take heads of up to {LARGEST_DIM}, got {dim}; pass impl="auto"')
    return choice.use_kernel(impl, x, check=check) and dim <= LARGEST_DIM


def _check(kind: str, driven: Tensor, matrix: Tensor, inside: Tensor | None, state: Sequence[Tensor]) -> None:
    if kind not in KINDS:
        raise ValueError(f"a recurrent cell is one of {', '.join(KINDS)}, got {kind!r}")
    gates, states = KINDS[kind].gates, KINDS[kind].states
    if driven.dim() != 4 or matrix.dim() != 3:
        raise ValueError(f"driven must be [n, t, h, gates * d] and matrix [h, gates * d, d], got {list(driven.shape)} "
                         f"and {list(matrix.shape)}")  # fmt: skip
    n, _, heads, width = driven.shape
    dim = matrix.shape[2]
    if width != gates * dim or matrix.shape != (heads, width, dim):
        raise ValueError(f"{kind} has {gates} gates: driven must be [n, t, h, {gates} * d] and matrix [h, {gates} * d, "
                         f"d], got {list(driven.shape)} and {list(matrix.shape)}")  # fmt: skip
    if len(state) != states or any(x.shape != (n, heads, dim) for x in state):
        found = ", ".join(str(list(x.shape)) for x in state)
        raise ValueError(f"the state of {kind} is {states} tensors {[n, heads, dim]}, got {found}")
    if (inside is not None) != (kind == "gru") or (inside is not None and inside.shape != (heads, dim)):
        raise ValueError(f"inside is [{heads}, {dim}] for a gru, else None; got "
                         f"{None if inside is None else list(inside.shape)}")  # fmt: skip
