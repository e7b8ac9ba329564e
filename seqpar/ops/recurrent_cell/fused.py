"""Recurrent cells in their kernels, as a function that autograd knows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from seqpar.collectives.first_order import first_order
from seqpar.ops.precision import exactly
from seqpar.ops.recurrent_cell.reference import KINDS, Tensors
from seqpar.ops.recurrent_cell.tiles import MULTIPLE


def recur(
    kind: str, driven: Tensor, matrix: Tensor, inside: Tensor | None, state: Sequence[Tensor], narrow: bool = False
) -> tuple[Tensor, Tensors]:
    """Rows ``[n, t, h, d]`` and the state after them: see :func:`seqpar.ops.recurrent_cell.recur`."""
    dim = matrix.shape[2]
    now = [pad(x, (0, -dim % MULTIPLE)) for x in state]
    rows, *final = _Recur.apply(kind, narrow, *_padded(driven, matrix, inside), *now)
    return rows[..., :dim], tuple(x[..., :dim] for x in final)


def _padded(driven: Tensor, matrix: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """With channels that neither read the others nor are read, up to a dim that rows are loaded well with."""
    dim = matrix.shape[2]
    more = -dim % MULTIPLE
    if not more:
        return driven, matrix, inside
    driven = pad(driven.unflatten(-1, (-1, dim)), (0, more)).flatten(-2)
    matrix = pad(matrix.unflatten(1, (-1, dim)), (0, more, 0, more)).flatten(1, 2)
    return driven, matrix, None if inside is None else pad(inside, (0, more))


@first_order("a recurrent cell in its kernels")
class _Recur(torch.autograd.Function):
    @staticmethod
    @exactly
    def forward(
        ctx: Any, kind: str, narrow: bool, driven: Tensor, matrix: Tensor, inside: Tensor | None, *state: Tensor
    ) -> tuple[Tensor, ...]:
        from seqpar.ops.recurrent_cell import kernel

        wide = _multiplied(matrix, narrow)
        noted = any(ctx.needs_input_grad)
        states, notes = kernel.forward(kind, driven.transpose(0, 1), wide, inside, torch.stack(state), noted)
        ctx.kind, ctx.narrow, ctx.dtypes = kind, narrow, (driven.dtype, None if inside is None else inside.dtype)
        ctx.save_for_backward(matrix, states, notes)
        return states[0, 1:].transpose(0, 1), *states[:, -1].unbind()

    @staticmethod
    @exactly
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from seqpar.ops.recurrent_cell import kernel_backward

        matrix, states, notes = ctx.saved_tensors
        wide = _multiplied(matrix, ctx.narrow)
        d_out, d_final = grads[0].transpose(0, 1), torch.stack(grads[1:])
        d_gates, d_initial = kernel_backward.backward(ctx.kind, notes, wide, states, d_out, d_final)
        dim = matrix.shape[2]
        recurrent = d_gates[..., : KINDS[ctx.kind].gates * dim]
        d_matrix = torch.einsum("tnhg,tnhd->hgd", recurrent, states[0, :-1]).to(matrix.dtype)
        dtype, inside_dtype = ctx.dtypes
        if ctx.kind != "gru":
            return None, None, d_gates.transpose(0, 1).to(dtype), d_matrix, None, *d_initial.unbind()
        d_inside = recurrent[..., 2 * dim :].sum((0, 1)).to(inside_dtype)
        d_driven = torch.cat([d_gates[..., : 2 * dim], d_gates[..., 3 * dim :]], -1)
        return None, None, d_driven.transpose(0, 1).to(dtype), d_matrix, d_inside, *d_initial.unbind()


def _multiplied(matrix: Tensor, narrow: bool) -> Tensor:
    """As kernels take it: in fp32 for fp16, beyond whose range gradients may be."""
    if narrow:
        return matrix.bfloat16()
    return matrix.float() if matrix.dtype == torch.float16 else matrix
