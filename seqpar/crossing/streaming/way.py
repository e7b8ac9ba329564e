"""The way of a state through the stretches of all legs, and the way back of its gradient.

What waits for nobody is run first: forwards the stretch whose end another rank waits for, if it begins here; backwards
the one whose beginning was another rank's, if it ends here. Only a document that lies on three ranks makes the middle
one wait before it sends.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.crossing.legs import Leg
from seqpar.crossing.streaming.running import Kept, Ran, Running, Shared, packed
from seqpar.crossing.streaming.stretches import Stretch, Stretches, stretches_of
from seqpar.sharding.shard import Shard


class Job(NamedTuple):
    """What a call needs to know besides tensors. ``counts``: how many are of tokens, parameters and initial states;
    ``position``: how many tokens of the document that goes on came before this call; ``final``: the state after all is
    wanted; ``training``: there may be a backward."""

    running: Running
    legs: tuple[Leg, ...]
    shard: Shard
    group: Group
    counts: tuple[int, int, int]
    backwards: bool
    position: int
    final: bool
    training: bool

    def parted(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Those of tokens, parameters and initial states."""
        first, second = self.counts[0], self.counts[0] + self.counts[1]
        return tuple(tensors[:first]), tuple(tensors[first:second]), tuple(tensors[second:])

    def stretches(self, place: int, device: torch.device) -> Stretches:
        """Mine of one leg; the last is run on its own wherever someone may want its state."""
        leg = self.legs[place]
        leaves = self.final if leg.last and place + 1 == len(self.legs) else leg.last or self.peer(leg, 1) is not None
        return stretches_of(self.shard, leg, self.backwards, leaves, device)

    def place(self, stretch: Stretch) -> int:
        """How many tokens of its document came before it, those of earlier calls among them."""
        goes_on = len(self.shard.lengths) - 1 if self.backwards else 0
        return stretch.position + (self.position if stretch.document == goes_on else 0)

    def peer(self, leg: Leg, ahead: int) -> int | None:
        """The rank after me on the leg (``ahead`` 1), or before me (-1), if a state crosses the cut between us."""
        step = -ahead if leg.reverse else ahead
        cut = min(self.group.rank, self.group.rank + step)
        return self.group.rank + step if 0 <= cut < len(leg.crosses) and leg.crosses[cut] else None

    def send(self, state: Tensor | None, leg: Leg, ahead: int) -> None:
        """To the rank after me, or before me, if there is one that waits for it."""
        to = self.peer(leg, ahead)
        if to is not None:
            assert state is not None
            self.group.exchange(state.contiguous(), to, None, None)

    def receive(self, room: Tensor, leg: Leg, ahead: int) -> Tensor | None:
        """From the rank after me, or before me; None if no state crosses that cut."""
        source = self.peer(leg, ahead)
        return None if source is None else self.group.exchange(None, None, torch.empty_like(room), source).wait()


def exact_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 if any of the tensors is."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


class Forward:
    """The way forward. ``kept``: what was kept of each run, in the order of :func:`runs`."""

    def __init__(self, job: Job, entering: Tensor | None, tensors: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.job, self.dtype = job, exact_dtype(entering, *tensors)
        self.needs, needs_params, _ = job.parted(needs)
        self.once = not job.running.recompute and any(needs)
        self.tokens, params, initial = job.parted(tensors)
        self.params = Shared(params, needs_params, self.dtype).leaves
        self.fresh = packed([x.to(self.dtype)[None] for x in initial])
        self.entering = None if entering is None else entering.to(self.dtype)
        self.kept: list[Kept] = []
        x = self.tokens[0]
        self.out: Tensor | None = None
        if job.group.size > 1 or not x.shape[1] or not x.shape[0]:
            self._make_room(self._probe())

    def rows(self) -> Tensor:
        """What all stretches gave."""
        assert self.out is not None
        return self.out

    def _probe(self) -> Tensor:
        """What one row gives: before the first message, a cell that does not fit raises on every rank."""
        rows = tuple(x.new_zeros((1, 1, *x.shape[2:])) for x in self.tokens)
        return self.job.running.forward(self.params, rows, self.fresh, 0)[0]

    def _make_room(self, like: Tensor) -> Tensor:
        if self.out is None:
            x = self.tokens[0]
            self.out = x.new_empty((*x.shape[:2], *like.shape[2:]))
        return self.out

    def _new(self) -> Tensor:
        return self.fresh.expand(self.tokens[0].shape[0], -1)

    def travel(self, given: Sequence[Tensor | None] | None = None) -> list[Tensor | None]:
        """What comes in on each leg, and last what leaves the last one. ``given``: what came in when this ran first;
        then nothing is sent."""
        handed, incoming = self.entering, []
        for place, leg in enumerate(self.job.legs):
            stretches = self.job.stretches(place, self.tokens[0].device)
            arrived, handed = self._leg(stretches, leg, handed, given if given is None else given[place : place + 1])
            incoming.append(arrived)
        return [*incoming, handed]

    def _leg(
        self, of: Stretches, leg: Leg, handed: Tensor | None, given: Sequence[Tensor | None] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        leaving, waits = None, of.last is None or of.last is of.first
        if of.last is not None and not waits:
            leaving = self._alone(of, of.last, self._new())
            self._send(leaving, leg, given)
        self._inner(of)
        arrived = given[0] if given is not None else handed if leg.first else self.job.receive(self._new(), leg, -1)
        if of.first is not None:
            assert arrived is not None
            end = self._alone(of, of.first, arrived)
            leaving = end if waits else leaving
        elif of.empty:
            leaving = arrived
        if waits:
            self._send(leaving, leg, given)
        return arrived, leaving

    def _send(self, state: Tensor | None, leg: Leg, given: Sequence[Tensor | None] | None) -> None:
        if given is None:
            self.job.send(state, leg, 1)

    def _alone(self, of: Stretches, stretch: Stretch, state: Tensor) -> Tensor:
        rows = tuple(of.rows_of(x, stretch.start, stretch.stop) for x in self.tokens)
        out, end = self._run(rows, state, self.job.place(stretch))
        of.put(self._make_room(out), stretch.start, stretch.stop, out)
        return end

    def _run(self, rows: tuple[Tensor, ...], state: Tensor, position: int) -> tuple[Tensor, Tensor]:
        if self.once:
            out, end, kept = self.job.running.forward_once(self.params, rows, self.needs, state, position)
        else:
            out, end, kept = self.job.running.forward(self.params, rows, state, position)
        self.kept.append(kept)
        return out, end

    def _inner(self, of: Stretches) -> None:
        if of.inner is None:
            return
        outs = []
        for rows in zip(*(of.side_by_side(x, repeated=True) for x in self.tokens)):
            outs.append(self._run(rows, self.fresh.expand(rows[0].shape[0], -1), 0)[0])
        of.put_side_by_side(self._make_room(outs[0]), outs)

    def everywhere(self, leaving: Tensor | None) -> Tensor:
        """The state after all on every rank, if it is wanted."""
        nothing = self.fresh.new_zeros(()).expand(self._new().shape)
        if not self.job.final:
            return nothing
        mine = leaving if self.job.legs[-1].last else None
        return self.job.group.all_reduce(nothing.clone() if mine is None else mine.contiguous()).wait()


def runs(of: Stretches, kept: Iterator[Kept]) -> "Runs":
    """What forward ran on a leg, with what it kept, in the order of forward."""
    last = next(kept) if of.last is not None and of.last is not of.first else None
    inner = [next(kept) for _ in of.inner.shapes] if of.inner is not None else []
    return Runs(of, next(kept) if of.first is not None else None, inner, last)


class Runs(NamedTuple):
    """What was kept on a leg: of its first stretch, of the inner ones, of its last if that is another."""

    of: Stretches
    first: Kept | None
    inner: list[Kept]
    last: Kept | None


class Backward:
    """The way back: the gradient of a state comes from the rank after me, and goes on to the one before."""

    def __init__(
        self,
        job: Job,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        kept: Sequence[Kept],
        d_out: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.job, self.dtype, self.d_out = job, dtype, d_out
        self._tensors, self._needs = tensors, needs
        self.tokens, params, _ = job.parted(tensors)
        self.needs, needs_params, _ = job.parted(needs)
        self.params = Shared(params, needs_params, dtype)
        self.initial: Tensor | None = None
        self.d_tokens = [torch.zeros_like(x) if need else None for x, need in zip(self.tokens, self.needs)]
        self.sizes = job.running.sizes
        device, states = d_out.device, iter(kept)
        self.runs = [runs(job.stretches(place, device), states) for place in range(len(job.legs))]

    def travel(self, d_leaving: Tensor | None) -> Tensor:
        """The gradient of the state that enters the first leg: mine, where it enters here."""
        handed = None if d_leaving is None else d_leaving.to(self.dtype)
        for leg, of_leg in zip(reversed(self.job.legs), reversed(self.runs)):
            handed = self._leg(of_leg, leg, handed)
        legs = self.job.legs
        return self._room().zero_() if handed is None or not (legs and legs[0].first) else handed

    def _room(self) -> Tensor:
        return self.d_out.new_empty((self.d_out.shape[0], sum(x.numel() for x in self.sizes)), dtype=self.dtype)

    def _leg(self, run: Runs, leg: Leg, handed: Tensor | None) -> Tensor | None:
        of, d_entering = run.of, None
        waits = of.first is None or of.first is of.last
        if of.first is not None and not waits:
            d_entering = self._alone(of, of.first, run.first, None)
            self.job.send(d_entering, leg, -1)
        self._inner(of, run.inner)
        arrived = handed if leg.last else self.job.receive(self._room(), leg, 1)
        if of.last is not None:
            d_first = self._alone(of, of.last, run.first if of.last is of.first else run.last, arrived)
            if of.last is of.first:
                d_entering = d_first
            else:
                self._began(d_first)
        elif of.empty:
            d_entering = arrived
        if waits:
            self.job.send(d_entering, leg, -1)
        return d_entering

    def _alone(self, of: Stretches, stretch: Stretch, kept: Kept | None, d_state: Tensor | None) -> Tensor:
        assert kept is not None
        start, stop = stretch.start, stretch.stop
        rows = tuple(of.rows_of(x, start, stop) for x in self.tokens)
        ran = Ran(rows, self.needs, self.job.place(stretch), kept)
        d_entering, found = self.job.running.backward(self.params, ran, of.rows_of(self.d_out, start, stop), d_state)
        for d_x, part in zip(self.d_tokens, found):
            if d_x is not None and part is not None:
                of.put(d_x, start, stop, part)
        return d_entering

    def _inner(self, of: Stretches, kept: list[Kept]) -> None:
        if of.inner is None:
            return
        parts = []
        given = zip(*(of.side_by_side(x, repeated=True) for x in self.tokens))
        for rows, d_out, states in zip(given, of.side_by_side(self.d_out, repeated=False), kept):
            ran = Ran(rows, self.needs, 0, states)
            d_entering, found = self.job.running.backward(self.params, ran, d_out, None)
            self._began(d_entering)
            parts.append(found)
        for d_x, of_tensor in zip(self.d_tokens, zip(*parts)):
            if d_x is not None:
                of.put_side_by_side(d_x, [part for part in of_tensor if part is not None])

    def _began(self, d_state: Tensor) -> None:
        """Documents began with what this is the gradient of."""
        total = d_state.sum(0)
        self.initial = total if self.initial is None else self.initial + total

    def gradients(self) -> list[Tensor | None]:
        """Of all tensors that need one, in their dtypes; zeros on a rank that has nothing to add."""
        d_initial: list[Tensor] | list[None] = [None] * len(self.sizes)
        if self.initial is not None:
            parts = self.initial.split([size.numel() for size in self.sizes])
            d_initial = [part.view(size) for part, size in zip(parts, self.sizes)]
        found = [*self.d_tokens, *self.params.gradients, *d_initial]
        return [
            None if not need else torch.zeros_like(x) if grad is None else grad.to(x.dtype)
            for grad, x, need in zip(found, self._tensors, self._needs)
        ]
