"""The launches of decayed linear attention: what is allocated, how many programs, which tiles."""

import torch
from torch import Tensor

from seqpar.ops import launch
from seqpar.ops.decayed_linear_attention.gates import Gates, boundary_reach, broadcast_strides
from seqpar.ops.decayed_linear_attention.tiles import Block, Tiles


def dense(x: Tensor) -> Tensor:
    """``x`` itself if its rows are contiguous and the tokens of a chunk lie within 32-bit offsets, else a copy."""
    return x if x.stride(-1) == 1 and x.stride(1) < 1 << 22 else x.contiguous()


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of batch, token and head, of each tensor [b, t, h, dim]."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def run_chain(
    x: Tensor,
    y: Tensor,
    gates: Gates,
    tiles: Tiles,
    *,
    backward: bool,
    scale: float = 1.0,
    store: bool = True,
    initial: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """States at the chunks [b, h, n, k, v], the outgoing one [b, h, k, v], and totals of gates per channel.

    Where the blocks of all states are too few to fill the device, stretches of chunks are summed up first.
    """
    num_stretches = _stretches(x, y, gates, tiles)
    totals = None
    if num_stretches == 1:
        states = new_states(x, y, gates) if store else None
        outgoing, _, totals = _chain(x, y, gates, tiles, 1, backward, scale, initial, states)
        return states, outgoing.squeeze(2), totals
    ends, passed, totals = _chain(x, y, gates, tiles, num_stretches, backward, 1.0, None, None)
    before, outgoing = _fold(ends, passed, initial, scale, tiles.chain)
    states = new_states(x, y, gates) if store else None
    if states is not None:
        _chain(x, y, gates, tiles, num_stretches, backward, scale, before, states)
    return states, outgoing, totals


def _stretches(x: Tensor, y: Tensor, gates: Gates, tiles: Tiles) -> int:
    block = tiles.chain
    programs = x.shape[0] * x.shape[2] * -(-x.shape[-1] // block.k) * -(-y.shape[-1] // block.v)
    wanted = min(-(-tiles.programs // programs), gates.num_chunks // tiles.stretch)
    if wanted <= 1:
        return 1
    return -(-gates.num_chunks // -(-gates.num_chunks // wanted))


def new_states(x: Tensor, y: Tensor, gates: Gates) -> Tensor:
    b, _, h, k = x.shape
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else gates.dtype
    return x.new_empty(b, h, gates.num_chunks, k, y.shape[-1], dtype=dtype)


def _chain(
    x: Tensor,
    y: Tensor,
    gates: Gates,
    tiles: Tiles,
    num_stretches: int,
    backward: bool,
    scale: float,
    initial: Tensor | None,
    states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One launch: what leaves each stretch [b, h, s, k, v], what passes it [b, h, s, k], and totals of the gates."""
    from seqpar.ops.decayed_linear_attention import kernel

    (b, t, h, dim), dim_v, block = x.shape, y.shape[-1], tiles.chain
    outgoing = x.new_empty(b, h, num_stretches, dim, dim_v, dtype=gates.dtype)
    passed = x.new_empty(b, h, num_stretches, dim, dtype=gates.dtype)
    totals = x.new_empty(b, h, gates.num_chunks, dim, dtype=gates.dtype) if gates.lacks_totals else None
    programs = b * h * num_stretches * -(-dim // block.k) * -(-dim_v // block.v)
    launch.launch(
        kernel.chain_kernel,
        (programs,),
        *(x, y, *gates.tensors(), outgoing if initial is None else initial),
        *(outgoing if states is None else states, outgoing, passed, passed if totals is None else totals),
        *strides_of(x, y),
        *gates.strides(),
        *(t, gates.num_chunks, -(-gates.num_chunks // num_stretches), num_stretches, h, scale),
        *(dim, dim_v, gates.chunk, block.k, block.v, *gates.flags(), backward),
        *(states is not None, initial is not None, num_stretches > 1, totals is not None, tiles.precision),
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return outgoing, passed, totals


def _fold(ends: Tensor, passed: Tensor, initial: Tensor | None, scale: float, block: Block) -> tuple[Tensor, Tensor]:
    """The states before each stretch, and after the last."""
    from seqpar.ops.decayed_linear_attention import kernel

    b, h, num_stretches, dim, dim_v = ends.shape
    before, outgoing = torch.empty_like(ends), ends.new_empty(b, h, dim, dim_v)
    launch.launch(
        kernel.fold_kernel,
        (-(-dim // block.k) * -(-dim_v // block.v), b * h),
        *(ends, passed, outgoing if initial is None else initial, before, outgoing),
        *(num_stretches, scale, dim, dim_v, block.k, block.v, initial is not None),
        num_warps=block.warps,
    )
    return before, outgoing


def run_output(
    xyz: tuple[Tensor, Tensor, Tensor],
    scores: Tensor | None,
    states: Tensor,
    boundary: Tensor | None,
    gates: Gates,
    tiles: Tiles,
    *,
    backward: bool,
    scale: float,
) -> Tensor:
    """o of q, k, v, or dv of k, q, d_o: see the kernel."""
    from seqpar.ops.decayed_linear_attention import kernel

    (b, t, h, dim), dim_v, block = xyz[0].shape, xyz[2].shape[-1], tiles.output
    nothing = states.new_empty(0, dtype=gates.dtype)
    reach, reach_strides = _reach(gates, nothing, boundary, ascending=gates.reverse == backward)
    out = xyz[2].new_empty(b, t, h, dim_v)
    launch.launch(
        kernel.output_kernel,
        (b * gates.num_chunks * h * -(-dim_v // block.v),),
        *(*xyz, *gates.tensors(), nothing if scores is None else scores, states),
        *(nothing if boundary is None else boundary, reach, out),
        *strides_of(*xyz),
        *gates.strides(),
        *reach_strides,
        *(t, gates.num_chunks, h, scale, 1.0 if backward else scale),
        *(dim, dim_v, gates.chunk, block.k, block.v, *gates.flags(), backward),
        *(boundary is not None, gates.fades, tiles.precision),
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return out


def run_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    pairs: tuple[Tensor, Tensor] | None,
    states: tuple[Tensor, Tensor],
    boundaries: tuple[Tensor | None, Tensor | None],
    gates: Gates,
    tiles: Tiles,
    scale: float,
    *,
    before: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dk and the gradient of the gates, [b, t, h, 1 or k]: of q, k, v, d_o; dq and dk of pairs inside chunks; the
    states that enter and gradients of those that leave the chunks; the incoming state and the final one's gradient.

    dq and dk of ``before`` are added; ``dtype`` is theirs if it is not that of q.
    """
    from seqpar.ops.decayed_linear_attention import kernel_backward

    q, _, v, _ = inputs
    (b, t, h, dim), dim_v, block = q.shape, v.shape[-1], tiles.gradient
    dq, dk = (q.new_empty(q.shape, dtype=q.dtype if dtype is None else dtype) for _ in range(2))
    blocks = -(-dim // block.k)
    nothing, (incoming, d_final) = q.new_empty(0, dtype=gates.dtype), boundaries
    reach, reach_strides = _reach(gates, nothing, incoming, ascending=not gates.reverse)
    d_reach, d_reach_strides = _reach(gates, nothing, d_final, ascending=gates.reverse)
    d_gates = nothing
    if gates.shared or gates.vector:
        d_gates = q.new_empty((b, t, h, dim) if gates.vector else (blocks, b, t, h), dtype=gates.dtype)
    launch.launch(
        kernel_backward.gradient_kernel,
        (b * gates.num_chunks * h * blocks,),
        *(*inputs, *gates.tensors(), *((nothing, nothing) if pairs is None else pairs)),
        *(states[0], nothing if incoming is None else incoming, reach),
        *(states[1], nothing if d_final is None else d_final, d_reach),
        *(*((nothing, nothing) if before is None else before), dq, dk, d_gates),
        *strides_of(*inputs),
        *gates.strides(),
        *(d_reach_strides if incoming is None else reach_strides),
        *(t, gates.num_chunks, h, b, scale, dim, dim_v, gates.chunk, block.k, block.v, *gates.flags()),
        *(incoming is not None, d_final is not None, gates.fades, before is not None, tiles.precision),
        num_warps=block.warps,
        num_stages=block.stages,
    )
    if gates.shared:
        d_gates = (d_gates[0] if blocks == 1 else d_gates.sum(0)).unsqueeze(-1)
    return dq, dk, d_gates if gates.shared or gates.vector else None


def _reach(
    gates: Gates, nothing: Tensor, boundary: Tensor | None, *, ascending: bool
) -> tuple[Tensor, tuple[int, int]]:
    """What of a boundary state reaches each chunk in that order, and its strides."""
    if boundary is None or not gates.fades:
        return nothing, (0, 0)
    reach = boundary_reach(gates, ascending).contiguous()
    return reach, broadcast_strides(reach)
