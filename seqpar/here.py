"""Where one call of one layer stands: everything that mixes tokens, bound to the cut, so that layers stay short."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from collectives.group import where
from seqpar import convolution, recurrences
from seqpar.attention import attention
from seqpar.cut import Cut
from seqpar.exchanged import Slot
from seqpar.gradients import whole_gradient


@dataclass(frozen=True)
class Here:
    """One call of ``layer`` under ``cut``: make one at the start of the call and use it for all that crosses.

    The methods are the functions of the same name, with the cut's group, layout, scan, transport, implementation and
    slot filled in, and with the layer's states: those called ``state`` enter and leave (:class:`seqpar.states.States`).
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

    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        log_decay: Tensor | None = None,
        scale: float = 1.0,
        backwards: bool = False,
        state: str = "state",
    ) -> Tensor:
        """:func:`seqpar.recurrences.linear_attention`."""
        recurrence = recurrences.linear_attention
        return self._with_state(
            state,
            backwards,
            lambda initial, wanted: recurrence(
                q, k, v, log_decay=log_decay, scale=scale, backwards=backwards, initial_state=initial,
                return_final_state=wanted, shard=self.cut.shard, group=self.cut.group, scan=self.cut.scan,
                slot=self.slot, impl=self.cut.impl,
            ),
        )  # fmt: skip

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
        """:func:`seqpar.recurrences.delta_rule`."""
        recurrence = recurrences.delta_rule
        return self._with_state(
            state,
            False,
            lambda initial, wanted: recurrence(
                q, k, v, beta, log_decay=log_decay, scale=scale, initial_state=initial, return_final_state=wanted,
                shard=self.cut.shard, group=self.cut.group, scan=self.cut.scan, slot=self.slot, impl=self.cut.impl,
            ),
        )  # fmt: skip

    def diagonal_scan(self, x: Tensor, log_a: Tensor, *, backwards: bool = False, state: str = "state") -> Tensor:
        """:func:`seqpar.recurrences.diagonal_scan`."""
        return self._with_state(
            state,
            backwards,
            lambda initial, wanted: recurrences.diagonal_scan(
                x, log_a, backwards=backwards, initial_state=initial, return_final_state=wanted,
                shard=self.cut.shard, group=self.cut.group, scan=self.cut.scan, slot=self.slot, impl=self.cut.impl,
            ),
        )  # fmt: skip

    def selective_scan(
        self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, state: str = "state"
    ) -> Tensor:
        """:func:`seqpar.recurrences.selective_scan`."""
        return self._with_state(
            state,
            False,
            lambda initial, wanted: recurrences.selective_scan(
                u, delta, a, b, c, initial_state=initial, return_final_state=wanted,
                shard=self.cut.shard, group=self.cut.group, scan=self.cut.scan, slot=self.slot, impl=self.cut.impl,
            ),
        )  # fmt: skip

    def causal_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: str = "conv") -> Tensor:
        """:func:`seqpar.convolution.causal_conv`."""
        return self._with_state(
            state,
            False,
            lambda initial, wanted: convolution.causal_conv(
                x, weight, bias, initial=initial, return_final=wanted,
                shard=self.cut.shard, group=self.cut.group, slot=self.slot,
            ),
        )  # fmt: skip

    def token_shift(self, x: Tensor, *, state: str = "shift") -> Tensor:
        """:func:`seqpar.convolution.token_shift`."""
        return self._with_state(
            state,
            False,
            lambda initial, wanted: convolution.token_shift(
                x, initial=initial, return_final=wanted, shard=self.cut.shard, group=self.cut.group, slot=self.slot
            ),
        )

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        state: str = "keys and values",
    ) -> Tensor:
        """:func:`seqpar.attention`; with states, on one device, the keys and values of earlier calls are seen, too."""
        if self.cut.states is not None:
            return self._continued_attention(q, k, v, causal, window, scale, state)
        return attention(
            q, k, v, causal=causal, window=window, scale=scale, transport=self.cut.transport,
            shard=self.cut.shard, group=self.cut.group, slot=self.slot, impl=self.cut.impl,
        )  # fmt: skip

    def _continued_attention(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None, state: str
    ) -> Tensor:
        """Attention whose state is the keys and values that later tokens may see: ``[b, tokens, g, k + v]``."""
        lengths, states = self.cut.shard.lengths, self.cut.states
        assert states is not None
        if self.cut.group.size > 1 or len(lengths) != 1 or not causal:
            raise ValueError(
                f"{where(self.cut.group)}: softmax attention keeps states for one causal document on one rank; it got "
                f"documents of {list(lengths)} tokens on {self.cut.group.size} ranks: pass no states"
            )
        before = states.enter(self.layer, state)
        seen = torch.cat([k, v], -1)
        seen = seen if before is None else torch.cat([before, seen], 1)
        kept = seen if window is None else seen[:, max(0, seen.shape[1] - window + 1) :]
        states.leave(self.layer, state, kept)
        k, v = seen.split([k.shape[-1], v.shape[-1]], -1)
        return _last_queries(q, k, v, window, scale)

    def _with_state(self, name: str, backwards: bool, call: Callable[[Tensor | None, bool], Any]) -> Tensor:
        """The result of ``call(initial state, whether the final one is wanted)``, its states taken and kept."""
        states = self.cut.states
        if states is None:
            result: Tensor = call(None, False)
            return result
        if backwards:
            raise ValueError(
                f"{where(self.cut.group)}: {type(self.layer).__name__} reads documents backwards, so it keeps no "
                "states from one call to the next: pass no states"
            )
        initial = states.enter(self.layer, name)
        out, final = call(None if initial is None else whole_gradient(initial, self.cut.group), True)
        states.leave(self.layer, name, final)
        return out


def _last_queries(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Causal attention of the last tokens over all."""
    hidden = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    keys = torch.arange(k.shape[1], device=q.device)
    seen = keys <= hidden if window is None else (keys <= hidden) & (keys > hidden - window)
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, 2).transpose(1, 2) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, seen, scale=scale).transpose(1, 2)
