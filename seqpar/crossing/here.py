"""Where one call of one layer stands: everything that mixes tokens, bound to the cut, so that layers stay short."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.collectives.group import where
from seqpar.crossing import convolution, recurrences
from seqpar.crossing.attending.always import Always
from seqpar.crossing.attending.chunks import attention_of_chunks
from seqpar.crossing.attention import Window, attention
from seqpar.crossing.document_memory import DocumentMemory, document_memories
from seqpar.crossing.document_sum import document_sum
from seqpar.crossing.preceding import Preceding, preceding
from seqpar.crossing.replicated import whole_gradient
from seqpar.crossing.running_max import RunningMax, document_max, running_max
from seqpar.crossing.stream import stream
from seqpar.crossing.streaming.heads import stream_heads
from seqpar.crossing.streaming.running import Cell
from seqpar.ops.precision import exactly
from seqpar.ops.softmax_block.scores import Scores
from seqpar.sharding.cut import Cut
from seqpar.sharding.exchanged import Slot
from seqpar.sharding.shard import Shard
from seqpar.sharding.states import KEYS_AND_VALUES


@dataclass(frozen=True)
class Here:
    """One call of ``layer`` under ``cut``: make one at the start of the call and use it for all that crosses.

    The methods are the functions of the same name, with the cut's group, layout, scan, transport, implementation and
    slot filled in, and with the layer's states: those called ``state`` enter and leave
    (:class:`seqpar.sharding.states.States`).
    """

    cut: Cut
    layer: nn.Module
    slot: Slot

    @staticmethod
    def of(cut: Cut, layer: nn.Module) -> "Here":
        """The call of ``layer`` that begins now."""
        return Here(cut, layer, cut.slot(layer))

    @property
    def positions(self) -> Tensor:
        """``[t]``: the position of each of my tokens in its document."""
        return self.cut.positions

    @property
    def place(self) -> dict[str, Any]:
        """The arguments of everything that sends."""
        return {"shard": self.cut.shard, "group": self.cut.group, "slot": self.slot}

    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        log_decay: Tensor | None = None,
        scale: float = 1.0,
        out_dtype: torch.dtype | None = None,
        backwards: bool = False,
        state: str = "state",
    ) -> Tensor:
        """:func:`seqpar.crossing.recurrences.linear_attention`."""
        how: dict[str, Any] = {"log_decay": log_decay, "scale": scale, "out_dtype": out_dtype}
        call = partial(recurrences.linear_attention, q, k, v, **how)
        return _recur(self, call, state, backwards)

    def delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        *,
        log_decay: Tensor | None = None,
        scale: float = 1.0,
        state: str = "state",
    ) -> Tensor:
        """:func:`seqpar.crossing.recurrences.delta_rule`."""
        return _recur(self, partial(recurrences.delta_rule, q, k, v, beta, log_decay=log_decay, scale=scale), state)

    def diagonal_scan(self, x: Tensor, log_a: Tensor, *, backwards: bool = False, state: str = "state") -> Tensor:
        """:func:`seqpar.crossing.recurrences.diagonal_scan`."""
        return _recur(self, partial(recurrences.diagonal_scan, x, log_a), state, backwards)

    def selective_scan(
        self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, state: str = "state"
    ) -> Tensor:
        """:func:`seqpar.crossing.recurrences.selective_scan`."""
        return _recur(self, partial(recurrences.selective_scan, u, delta, a, b, c), state)

    def linear_system(self, u: Tensor, a: Tensor, b: Tensor, c: Tensor, *, state: str = "state") -> Tensor:
        """:func:`seqpar.crossing.recurrences.linear_system`."""
        return _recur(self, partial(recurrences.linear_system, u, a, b, c), state)

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: str = "conv") -> Tensor:
        """:func:`seqpar.crossing.convolution.causal_conv`."""
        conv = partial(convolution.causal_conv, x, weight, bias, **self.place)
        return _with_state(self, state, lambda initial, wanted: conv(initial=initial, return_final=wanted))

    def token_shift(self, x: Tensor, *, state: str = "shift") -> Tensor:
        """:func:`seqpar.crossing.convolution.token_shift`."""
        shift = partial(convolution.token_shift, x, **self.place)
        return _with_state(self, state, lambda initial, wanted: shift(initial=initial, return_final=wanted))

    def preceding(self, x: Tensor, left: int, *, state: str = "preceding") -> Preceding:
        """:func:`seqpar.crossing.preceding.preceding`."""
        call = partial(preceding, x, left, **self.place)
        return _with_state(self, state, lambda initial, wanted: call(initial=initial, return_final=wanted))

    def symmetric_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """:func:`seqpar.crossing.convolution.symmetric_conv`; it sees later tokens, so it keeps no state."""
        self.keep_no_states()
        return convolution.symmetric_conv(x, weight, bias, **self.place)

    def grid_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, width: int) -> Tensor:
        """:func:`seqpar.crossing.convolution.grid_conv`; it sees later tokens, so it keeps no state."""
        self.keep_no_states()
        return convolution.grid_conv(x, weight, bias, width=width, **self.place)

    def running_max(self, x: Tensor, *, state: str = "max") -> RunningMax:
        """:func:`seqpar.crossing.running_max.running_max`."""
        call = partial(running_max, x, **self.place)
        return _with_state(self, state, lambda initial, wanted: call(initial=initial, return_final=wanted))

    def document_max(self, x: Tensor) -> Tensor:
        """:func:`seqpar.crossing.running_max.document_max`; it sees later tokens, so it keeps no state."""
        self.keep_no_states()
        return document_max(x, **self.place)

    def document_sum(self, x: Tensor) -> Tensor:
        """:func:`seqpar.crossing.document_sum.document_sum`; it sees later tokens, so it keeps no state."""
        self.keep_no_states()
        return exactly(document_sum)(x, **self.place)

    def document_memories(self, *pairs: tuple[Tensor, Tensor]) -> list[DocumentMemory]:
        """:func:`seqpar.crossing.document_memory.document_memories`; tokens see later ones, so it keeps no state."""
        self.keep_no_states()
        return document_memories(pairs, **self.place)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        window: Window = None,
        scale: float | None = None,
        scores: Scores | None = None,
        always: Always | None = None,
        state: str = KEYS_AND_VALUES,
        key_shard: Shard | None = None,
    ) -> Tensor:
        """:func:`seqpar.attention`; with states it sees what earlier calls left, too: keys and values of all ranks."""
        how: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "scores": scores}
        how["impl"] = self.cut.impl
        if self.cut.states is not None and key_shard is None:
            if always is not None:
                self.keep_no_states()
            return attention_of_chunks(q, k, v, self.cut, self.layer, state=state, **how)
        how |= {"always": always, "transport": self.cut.transport, "key_shard": key_shard, **self.place}
        return attention(q, k, v, **how)

    def keep_no_states(self) -> None:
        """Raise ``ValueError`` if states are asked for: later tokens matter, which are not there yet."""
        if self.cut.states is not None:
            raise ValueError(
                f"{where(self.cut.group)}: {type(self.layer).__name__} sees later tokens, so it keeps no states from "
                "one call to the next: pass no states"
            )


def streamed(
    here: Here,
    cell: Cell,
    params: Sequence[Tensor],
    tokens: Sequence[Tensor],
    initial: Sequence[Tensor],
    *,
    chunk: int = 0,
    every: int = 0,
    learns: bool = False,
    recompute: bool = True,
    backwards: bool = False,
    over_heads: bool = False,
    state: str = "state",
) -> Tensor:
    """:func:`seqpar.crossing.stream.stream` here; ``over_heads``: ``stream_heads`` of ``crossing.streaming.heads``."""
    if backwards:
        here.keep_no_states()
    how: dict[str, Any] = {"chunk": chunk, "every": every, "learns": learns, "recompute": recompute}
    before = here.cut.states.position if chunk and here.cut.states is not None else 0
    way = stream_heads if over_heads else stream
    call = partial(way, cell, params, tokens, initial, backwards=backwards, position=before, **how, **here.place)
    return _with_state(here, state, lambda entering, wanted: call(entering=entering, return_leaving=wanted))


def _recur(here: Here, recurrence: Callable[..., Any], state: str, backwards: bool = False) -> Tensor:
    """A function of :mod:`seqpar.crossing.recurrences` on the cut, with its state."""
    if backwards:
        here.keep_no_states()
    run = partial(recurrence, backwards=backwards, scan=here.cut.scan, impl=here.cut.impl, **here.place)
    return _with_state(here, state, lambda initial, wanted: run(initial_state=initial, return_final_state=wanted))


def _with_state(here: Here, name: str, call: Callable[[Tensor | None, bool], Any]) -> Any:
    """The result of ``call(initial state, whether the final one is wanted)``, its states taken and kept."""
    states = here.cut.states
    if states is None:
        return call(None, False)
    initial = states.enter(here.layer, name)
    out, final = call(None if initial is None else whole_gradient(initial, here.cut.group), True)
    states.leave(here.layer, name, final, here.cut.exchanged)
    return out
