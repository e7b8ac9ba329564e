"""What layers remember from one chunk of tokens to the next: for long prefills, truncated training, and decoding."""

from torch import Tensor, nn

from seqpar.sharding.exchanged import backward_pass

Key = tuple[nn.Module, str]  # which layer, and which of its states


class States:
    """The states that enter with the first document of a call, and those that leave after its last one.

    Give a new one to the first call (``Cut.states``); its :meth:`next` enters the following call. ``position``: how
    many tokens of the first document came before. All ranks give and get the same states, and the same, whole
    gradients of them.
    """

    def __init__(self, entering: dict[Key, Tensor] | None = None, position: int = 0) -> None:
        self.entering = dict(entering or {})
        self.leaving: dict[Key, Tensor] = {}
        self.position = position

    def enter(self, layer: nn.Module, name: str) -> Tensor | None:
        """The state called ``name`` with which ``layer`` begins; None: nothing came before."""
        return self.entering.get((layer, name))

    def leave(self, layer: nn.Module, name: str, state: Tensor) -> None:
        """Keep what ``layer`` ends with (not again when it is recomputed in backward)."""
        if backward_pass() is None:
            self.leaving[layer, name] = state

    def next(self, tokens: int) -> "States":
        """For the call that continues this one, whose last document had ``tokens`` tokens in this call."""
        return States(self.leaving, self.position + tokens)

    def detach(self) -> "States":
        """The same numbers, through which no gradient goes back."""
        return States({key: state.detach() for key, state in self.entering.items()}, self.position)
