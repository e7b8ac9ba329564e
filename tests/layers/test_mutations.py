"""The battery is red where it should be: layers that are wrong in the ways that cut layers go wrong.

Each mutation replaces one function, and some rows of the battery must then fail. They are the usual faults of sequence
parallelism: a rank before mine forgotten, summaries folded in another order, a transition not transposed on its way
back, a halo that reaches one rank only, documents that see each other, states that end at a call.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import seqpar.collectives.scan
import seqpar.crossing.legs
import seqpar.crossing.recurrence
import seqpar.crossing.stream
import seqpar.layers.memory.mac
from seqpar.collectives.group import Later
from seqpar.collectives.transition import Transition
from seqpar.crossing import convolution
from seqpar.crossing.streaming.way import Job
from seqpar.layers.memory.rules import Carried
from seqpar.sharding.states import States
from tests.layers.rows import ROWS
from tests.layers.test_battery import PACKED, assert_equal, expected_of, in_chunks, on_ranks, run_ranks

Patch = pytest.MonkeyPatch
SCANNED = ("linear attention", "gla", "mamba2", "deltanet", "gated deltanet", "kda", "mamba", "s5", "lssl")
DECAYING = ("gla", "mamba2", "gated deltanet", "kda", "mamba")
MATRICES = ("deltanet", "gated deltanet", "kda")
STREAMED = ("elman", "lstm", "slstm", "leaky", "titans", "yaad", "omeganet", "hmt")
CHUNKED = ("titans", "yaad", "omeganet", "titans mac", "rmt, gradients of two segments")


def rows(*names: str) -> list[str]:
    """Those of ``names`` that the battery has, each with its first variant."""
    found = [next((row for row in ROWS if row == name or row.startswith(f"{name},")), None) for name in names]
    return [row for row in found if row is not None]


def dropped_predecessor(patch: Patch) -> None:
    """Only the rank before mine is folded: farther ones are forgotten."""
    real = seqpar.collectives.scan._Line.stops

    def stops(line: Any, first: int, last: int) -> bool:
        return bool(real(line, first, last)) or first > 0

    patch.setattr(seqpar.collectives.scan._Line, "stops", stops)


def wrong_fold_order(patch: Patch) -> None:
    """Summaries are folded from the nearest rank to the farthest."""
    real = seqpar.collectives.scan._Line.rank_at

    def rank_at(line: Any, place: int) -> int:
        return int(real(line, line.place - 1 - place)) if place < line.place else int(real(line, place))

    def place(line: Any) -> int:
        return int(line.group.size - 1 - line.group.rank if line.reverse else line.group.rank)

    patch.setattr(seqpar.collectives.scan._Line, "place", property(place))
    patch.setattr(seqpar.collectives.scan._Line, "rank_at", rank_at)


def untransposed_transition(patch: Patch) -> None:
    """Gradients pass through the matrix itself, not its transpose."""
    real = Transition.adjoint

    def adjoint(transition: Transition) -> Transition:
        return transition if transition.matrix else real(transition)

    patch.setattr(Transition, "adjoint", adjoint)


def forgotten_transition(patch: Patch) -> None:
    """States pass through other ranks as if nothing faded there."""
    patch.setattr(Transition, "apply", lambda transition, state: state)


def leak_across_documents(patch: Patch) -> None:
    """No document starts anywhere but at the first token of a rank's run."""
    real = seqpar.crossing.legs.legs_of

    def legs_of(*args: Any) -> Any:
        legs = real(*args)
        return None if legs is None else tuple(replace(leg, starts=()) for leg in legs)

    patch.setattr(seqpar.crossing.recurrence, "legs_of", legs_of)
    patch.setattr(seqpar.crossing.stream, "legs_of", lambda *args: _crossed(real(*args)))


def _crossed(legs: Any) -> Any:
    """Legs of one document."""
    if legs is None:
        return None
    began = [leg.rows[0] < leg.rows[1] and leg.first and 0 in leg.starts for leg in legs]
    kept = [(0,) if first else () for first in began]
    return tuple(replace(leg, starts=s, crosses=(True,) * len(leg.crosses)) for leg, s in zip(legs, kept))


def halo_of_one_rank(patch: Patch) -> None:
    """What a window needs from two ranks away, and farther, is taken for zero."""
    real = convolution.swap

    def swap(x: Tensor, plan: Any, group: Any) -> Later[Tensor]:
        pending = real(x, plan, group)

        def neighbours() -> Tensor:
            parts = list(pending.wait().clone().split(list(plan.receives), 1))
            return torch.cat([p if abs(r - group.rank) < 2 else torch.zeros_like(p) for r, p in enumerate(parts)], 1)

        return Later(neighbours)

    patch.setattr(convolution, "swap", swap)


def received(patch: Patch, ahead: int, change: Callable[[Tensor], Tensor]) -> None:
    """What comes along a stream (-1: from the rank before me; 1: its gradient, from the rank after me), changed."""
    real = Job.receive

    def receive(job: Job, room: Tensor, leg: Any, which: int) -> Tensor | None:
        found = real(job, room, leg, which)
        return change(found) if found is not None and which == ahead else found

    patch.setattr(Job, "receive", receive)


def narrow_state(patch: Patch) -> None:
    """A state travels in bf16."""
    received(patch, -1, lambda state: state.bfloat16().to(state.dtype))


def dropped_stabiliser(patch: Patch) -> None:
    """The gradient of sLSTM's ``m``, the last of four, ends at the cut."""
    received(patch, 1, lambda grad: torch.cat([grad[:, : -grad.shape[1] // 4], 0 * grad[:, -grad.shape[1] // 4 :]], 1))


def forgotten_gradient(patch: Patch) -> None:
    """No gradient comes back over a cut."""
    received(patch, 1, torch.zeros_like)


def grid_of_the_rank(patch: Patch) -> None:
    """Chunks are counted from a rank's first token, not from the document's."""
    patch.setattr(Job, "place", lambda job, stretch: 0)


def dropped_momentum(patch: Patch) -> None:
    """The momentum of a memory ends where a stretch does."""
    real = Carried.state

    def state(carried: Carried) -> Any:
        return real(carried._replace(momentum=tuple(torch.zeros_like(m) for m in carried.momentum)))

    patch.setattr(Carried, "state", state)


def printed_mask(patch: Patch) -> None:
    """MAC as it is printed: what the memory says to a segment stands before all of its tokens."""
    real = seqpar.layers.memory.mac.visible

    def visible(steps: int, tokens: int, persistent: int, device: torch.device) -> Tensor:
        mask = real(steps, tokens, persistent, device)
        mask[:, : persistent + tokens] = True
        return mask

    patch.setattr(seqpar.layers.memory.mac, "visible", visible)


def forgotten_states(patch: Patch) -> None:
    """A call begins anew instead of where the last one ended."""
    patch.setattr(States, "enter", lambda states, layer, name: None)


CUT: dict[str, tuple[Callable[[Patch], None], list[str], int, list[int]]] = {
    "dropped predecessor": (dropped_predecessor, rows(*SCANNED), 5, [40]),
    "wrong fold order": (wrong_fold_order, rows(*DECAYING), 5, [40]),
    "untransposed transition": (untransposed_transition, rows(*MATRICES), 3, [40]),
    "forgotten transition": (forgotten_transition, rows(*DECAYING, *MATRICES), 3, [40]),
    "halo of one rank": (halo_of_one_rank, rows("short_convolution", "gam", "mamba2", "deltanet"), 8, [12]),
    "leak across documents": (leak_across_documents, rows(*SCANNED, *STREAMED), 3, PACKED),
    "state in bf16": (narrow_state, rows(*STREAMED), 3, [16]),
    "gradient of m dropped": (dropped_stabiliser, rows("slstm"), 3, [16]),
    "forgotten gradient": (forgotten_gradient, rows(*STREAMED), 3, [16]),
    "grid of the rank": (grid_of_the_rank, rows(*CHUNKED), 3, [16]),
    "dropped momentum": (dropped_momentum, rows("titans", "atlas", "titans mac"), 3, [16]),
    "printed mask": (printed_mask, ["titans mac"], 3, [16]),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("fault", "name"), [(fault, name) for fault in CUT for name in CUT[fault][1]])
def test_a_wrong_layer_is_seen(fault: str, name: str, monkeypatch: Patch) -> None:
    breaks, _, size, lengths = CUT[fault]
    expected_of(name, tuple(lengths))  # before anything is broken
    breaks(monkeypatch)
    with pytest.raises(AssertionError):
        on_ranks(size, name, lengths, "contiguous")


@pytest.mark.parametrize("name", rows(*SCANNED, "lstm", "titans", "titans mac", "short_convolution", "softmax"))
def test_forgotten_states_are_seen(name: str, monkeypatch: Patch) -> None:
    expected = expected_of(name, (17,))
    forgotten_states(monkeypatch)
    with pytest.raises(AssertionError):
        for outcome in run_ranks(1, in_chunks, name, [9, 8]):
            assert_equal(outcome, expected)
