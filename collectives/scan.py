"""The exclusive scan: what state reaches my first token, when every rank changes the state that passes through it.

A rank's tokens do one affine thing to a state, ``S -> T S + state`` with a :class:`Transition` ``T``; or, when a
document starts among them, ``S -> state``. LASP-1, LASP-2 and ZeCO are this scan with three ways of passing notes, and
the adjoint of an exclusive scan is the reverse exclusive scan, so one autograd function serves them all.

Cost per rank and direction, ``n`` ranks, ``B`` bytes of state, ``A`` bytes of a transition that only its rank knows:

============== ============================ ======================= =====================================
algorithm      bytes sent                   messages                source
============== ============================ ======================= =====================================
``all_gather`` ``(n - 1) (A + B)``          ``n - 1``               LASP-2, arXiv 2502.07563
``all_scan``   ``B``                        number of blocks        ZeCO, arXiv 2507.01004
``ring``       ``B``                        1                       LASP-1, arXiv 2404.02882
``doubling``   up to ``log2(n) (A + B)``    up to ``log2(n)``       Hillis and Steele, CACM 1986
============== ============================ ======================= =====================================
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqpar.collectives.agreed import agree
from seqpar.collectives.first_order import first_order
from seqpar.collectives.group import Group, Later, Pending, where
from seqpar.collectives.transition import Transition, together

ALGORITHMS = ("all_gather", "all_scan", "ring", "doubling")


@dataclass(frozen=True)
class Summary:
    """What my tokens do to a state that passes through them, and what every rank knows of the others.

    ``state``: ``[..., k, v]``, fp32 or fp64 (or complex): the state after my tokens, had it entered as zero.
    ``transition``: what they do to one that enters. None: nothing (identity). A sequence with every rank's: constant,
    all know it, so it never travels. One :class:`Transition`: mine alone, a scalar, vector, full or matrix kind.
    ``resets``: for every rank, whether a document starts among its tokens: then nothing passes through.
    ``crosses``: for each of the ``size - 1`` cuts, whether a document crosses it: nothing is sent where none does.
    """

    state: Tensor
    transition: Transition | Sequence[Transition] | None = None
    resets: tuple[bool, ...] = ()
    crosses: tuple[bool, ...] = ()

    @property
    def kind(self) -> str:
        """``identity``, ``constant``, ``scalar``, ``vector``, ``full`` or ``matrix``."""
        if self.transition is None:
            return "identity"
        return self.transition.kind if isinstance(self.transition, Transition) else "constant"


def pass_through(state: Tensor, transition: Transition | None, stops: bool, incoming: Tensor | None) -> Tensor:
    """The state that leaves, when ``incoming`` enters tokens that leave ``state`` from zero."""
    if stops or incoming is None:
        return state
    return state + (incoming if transition is None else transition.apply(incoming))


@dataclass(frozen=True)
class _Line:
    """The ranks in the order in which the state visits them; I stand at ``place``."""

    group: Group
    reverse: bool
    summary: Summary

    @property
    def place(self) -> int:
        return self.rank_at(self.group.rank)

    def rank_at(self, place: int) -> int:
        return self.group.size - 1 - place if self.reverse else place

    def stops(self, first: int, last: int) -> bool:
        """Whether what left place ``first - 1`` ends before it has passed places ``first`` to ``last``."""
        places = range(first, last + 1)
        ends = any(self.summary.resets[self.rank_at(place)] for place in places)
        return ends or any(not self.crosses(place - 1) for place in places if place > 0)

    def crosses(self, place: int) -> bool:
        """Whether a document goes on from ``place`` to ``place + 1``."""
        if not 0 <= place < self.group.size - 1:
            return False
        return self.summary.crosses[self.group.size - 2 - place if self.reverse else place]

    def transition(self, place: int) -> Transition | None:
        """The transition at ``place``, if I know it without a message."""
        transition = self.summary.transition
        if transition is None or isinstance(transition, Transition):
            return transition if place == self.place else None
        return transition[self.rank_at(place)]

    @property
    def travelling(self) -> Transition | None:
        """Mine, if nobody else knows it."""
        return self.summary.transition if isinstance(self.summary.transition, Transition) else None


# An algorithm is a generator: it starts its first messages, yields once, and returns the incoming state (None: zero).
_Steps = Generator[None, None, Tensor | None]


def _wire(x: Tensor) -> Tensor:
    """``x`` as real numbers in one piece: what every backend sends."""
    return (torch.view_as_real(x) if x.is_complex() else x).contiguous()


def _unwire(message: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(message.view(*like.shape, 2))
    return message.view(like.shape)


def _pack(state: Tensor, transition: Transition | None) -> Tensor:
    if transition is None:
        return _wire(state).flatten()
    return torch.cat([_wire(state).flatten(), _wire(transition.value).flatten()])


def _unpack(message: Tensor, state: Tensor, transition: Transition | None) -> tuple[Tensor, Transition | None]:
    numbers = state.numel() * (2 if state.is_complex() else 1)
    received = _unwire(message[:numbers], state)
    if transition is None:
        return received, None
    return received, replace(transition, value=_unwire(message[numbers:], transition.value))


def _all_gather(line: _Line, blocks: int | None) -> _Steps:
    """LASP-2: everyone gets every summary and folds those before it."""
    mine, travelling = line.summary.state, line.travelling
    pending = line.group.all_gather(_pack(mine, travelling))
    yield
    messages = pending.wait()
    incoming = None
    for place in range(line.place):
        state, transition = _unpack(messages[line.rank_at(place)], mine, travelling)
        known = line.transition(place) if travelling is None else transition
        incoming = pass_through(state, known, line.stops(place, place), incoming)
    return incoming if line.crosses(line.place - 1) else None


def _all_scan(line: _Line, blocks: int | None) -> _Steps:
    """ZeCO: one state per link, in blocks (of key rows; of columns under a matrix) that are passed on as they come."""
    state, group, place, mine = line.summary.state, line.group, line.place, line.transition(line.place)
    dim = -2 if mine is None else mine.block_dim
    parts = torch.tensor_split(state, blocks or choose_blocks(state, group.size, dim), dim=dim)
    source = line.rank_at(place - 1) if line.crosses(place - 1) else None
    to = line.rank_at(place + 1) if line.crosses(place) else None
    arriving = group.exchange(None, None, torch.empty_like(_wire(parts[0])), source)
    yield
    incoming, offset, sent = [], 0, []
    for index, part in enumerate(parts):
        message = arriving.wait()
        received = None if message is None else _unwire(message, part)
        through = None if mine is None else mine.block(offset, part.shape[dim])
        leaving = pass_through(part, through, line.stops(place, place), received)
        following = torch.empty_like(_wire(parts[index + 1])) if index + 1 < len(parts) else None
        arriving = group.exchange(_wire(leaving), to, following, source if following is not None else None)
        offset += part.shape[dim]
        if received is not None:
            incoming.append(received)
        sent.append(arriving)
    arriving.wait()
    return torch.cat(incoming, dim=dim) if incoming else None


def choose_blocks(state: Tensor, size: int, dim: int = -2, bytes_per_latency: int = 200_000) -> int:
    """How many blocks finish the pipelined chain first: ``sqrt((n - 2) B / (bytes sent in one latency))``."""
    ideal = math.sqrt(max(size - 2, 0) * state.numel() * state.element_size() / bytes_per_latency)
    return max(1, min(round(ideal), state.shape[dim]))


def _ring(line: _Line, blocks: int | None) -> _Steps:
    """LASP-1: the whole state, from rank to rank."""
    return _all_scan(line, 1)


def _doubling(line: _Line, blocks: int | None) -> _Steps:
    """Hillis and Steele: after step ``i`` a rank knows the ``2**i`` ranks before it."""
    group, place = line.group, line.place
    window, mine = line.summary.state, line.transition(place)  # of the ranks place - distance + 1 .. place
    incoming, before = None, None if mine is None else mine.nothing()  # of those before me
    distance, started = 1, False
    while distance < group.size:
        last = 2 * distance >= group.size
        travelling = mine if line.travelling is not None and not last else None
        message = _pack(window, travelling)
        to = line.rank_at(place + distance) if place + distance < group.size else None
        source = line.rank_at(place - distance) if place >= distance else None
        arriving = group.exchange(message, to, torch.empty_like(message), source)
        if not started:
            started = True
            yield
        received = arriving.wait()
        if received is not None:
            state, theirs = _unpack(received, window, travelling)
            if line.travelling is None:
                theirs = _known(line, place - 2 * distance + 1, place - distance)
            stops_before = distance > 1 and line.stops(place - distance + 1, place - 1)
            incoming = state if incoming is None else pass_through(incoming, before, stops_before, state)
            window = pass_through(window, mine, line.stops(max(place - distance + 1, 0), place), state)
            if theirs is not None and mine is not None and before is not None:
                mine, before = mine.after(theirs), before.after(theirs)
        distance *= 2
    return incoming if line.crosses(place - 1) else None


def _known(line: _Line, first: int, last: int) -> Transition | None:
    return together([line.transition(place) for place in range(max(first, 0), last + 1)])


_STEPS: dict[str, Callable[[_Line, int | None], _Steps]] = {
    "all_gather": _all_gather,
    "all_scan": _all_scan,
    "ring": _ring,
    "doubling": _doubling,
}


def _finish(steps: _Steps) -> Tensor | None:
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        result: Tensor | None = stop.value
        return result


def _start_on_side_stream(steps: _Steps, state: Tensor) -> Pending[Tensor | None]:
    """CUDA: queue the whole scan beside the main stream, so that it travels while the caller computes."""
    side = torch.cuda.Stream(state.device)
    side.wait_stream(torch.cuda.current_stream(state.device))
    state.record_stream(side)
    with torch.cuda.stream(side):
        result = _finish(steps)

    def join() -> Tensor | None:
        current = torch.cuda.current_stream(state.device)
        current.wait_stream(side)
        if result is not None:
            result.record_stream(current)
        return result

    return Later(join)


def check_summary(summary: Summary, group: Group, algorithm: str, blocks: int | None) -> Summary:
    """The summary with its defaults filled in; ``ValueError``, the same on every rank, if it cannot be scanned."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{where(group)}: scan must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if blocks is not None and blocks < 1:
        raise ValueError(f"{where(group)}: blocks must be at least 1, got {blocks}")
    if summary.state.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise ValueError(f"{where(group)}: states travel in float32 or float64, got {summary.state.dtype}")
    resets = summary.resets or (False,) * group.size
    crosses = summary.crosses or (True,) * (group.size - 1)
    if len(resets) != group.size or len(crosses) != group.size - 1:
        raise ValueError(
            f"{where(group)}: expected {group.size} resets and {group.size - 1} crosses, "
            f"got {len(resets)} and {len(crosses)}"
        )
    return replace(summary, state=summary.state.contiguous(), resets=resets, crosses=crosses)


def start_scan(
    summary: Summary, group: Group, *, algorithm: str, reverse: bool = False, blocks: int | None = None
) -> Pending[Tensor]:
    """Start :func:`exclusive_scan` outside autograd: the scan travels until ``wait()`` gives the incoming state."""
    summary = check_summary(summary, group, algorithm, blocks)
    if not any(summary.crosses):
        return Later(lambda: torch.zeros_like(summary.state))
    steps = _STEPS[algorithm](_Line(group, reverse, summary), blocks)
    pending: Pending[Tensor | None]
    if summary.state.is_cuda:
        pending = _start_on_side_stream(steps, summary.state)
    else:
        next(steps)
        pending = Later(lambda: _finish(steps))

    def incoming() -> Tensor:
        result = pending.wait()
        return torch.zeros_like(summary.state) if result is None else result

    return Later(incoming)


@first_order("exclusive_scan")
class _ExclusiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, summary: Summary, call: dict[str, Any], *values: Tensor) -> Tensor:
        incoming = start_scan(summary, **call).wait()
        ctx.summary, ctx.call = replace(summary, state=state.new_empty(0)), call
        ctx.save_for_backward(incoming, *values)
        return incoming

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        incoming, *values = ctx.saved_tensors
        group: Group = ctx.call["group"]
        transitions = [replace(t, value=value) for t, value in zip(_listed(ctx.summary.transition), values)]
        adjoints = [transition.adjoint() for transition in transitions]
        back = adjoints[0] if isinstance(ctx.summary.transition, Transition) else adjoints or None
        summary = replace(ctx.summary, state=grads[0].contiguous(), transition=back)
        leaving = start_scan(summary, **{**ctx.call, "reverse": not ctx.call["reverse"]}).wait()
        d_values: list[Tensor | None] = [None] * len(values)
        if values:
            mine = 0 if isinstance(back, Transition) else group.rank
            reset = ctx.summary.resets and ctx.summary.resets[group.rank]
            d_values[mine] = _d_value(transitions[mine], incoming, torch.zeros_like(leaving) if reset else leaving)
        return leaving, None, None, *d_values


def _d_value(transition: Transition, incoming: Tensor, leaving: Tensor) -> Tensor:
    """The gradient of ``transition.value``, of the state that leaves."""
    with torch.enable_grad():
        value = transition.value.detach().requires_grad_()
        through = replace(transition, value=value).apply(incoming)
        return torch.autograd.grad(through, value, leaving)[0]


def _listed(transition: Transition | Sequence[Transition] | None) -> list[Transition]:
    if transition is None:
        return []
    return [transition] if isinstance(transition, Transition) else list(transition)


def exclusive_scan(
    summary: Summary, group: Group, *, algorithm: str = "all_gather", reverse: bool = False, blocks: int | None = None
) -> Tensor:
    """The state that reaches my first token: rank 0 (the last rank, if ``reverse``) gets zero.

    Law: the incoming state of rank ``r`` is what a loop over the ranks before ``r`` leaves, for every algorithm; its
    gradient is the reverse scan of the upstream gradients, and every algorithm gives it.

    Shapes: ``summary.state [..., k, v]`` in, the same shape and dtype out; gradients reach the states and the values of
    the transitions. ``blocks`` cuts the state for ``"all_scan"`` (chosen from the message size if not given). States
    travel and fold in fp32 or fp64.
    Raises ``ValueError`` for an unknown algorithm, another dtype, or tables that do not fit the group.
    """
    kind = (summary.kind, summary.state.dtype, tuple(summary.state.shape), summary.resets, summary.crosses)
    grad = torch.is_grad_enabled() and summary.state.requires_grad
    agree(group, "exclusive_scan", (algorithm, reverse, blocks, *kind, grad))
    summary = check_summary(summary, group, algorithm, blocks)
    transitions = _listed(summary.transition)
    if summary.kind == "constant" and len(transitions) != group.size:
        raise ValueError(f"{where(group)}: a constant transition lists {group.size} ranks, got {len(transitions)}")
    call = {"group": group, "algorithm": algorithm, "reverse": reverse, "blocks": blocks}
    result: Tensor = _ExclusiveScan.apply(summary.state, summary, call, *(t.value for t in transitions))
    return result
