"""What layers remember from one chunk of tokens to the next: for long prefills, truncated training, and decoding."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from seqpar.sharding.exchanged import backward_pass

Key = tuple[nn.Module, str]  # which layer, and which of its states
POSITION = "position"  # among the names of what is saved
KEYS_AND_VALUES = "keys and values"  # of all tokens of the document that later ones may see, ``[b, tokens, ...]``


class States:
    """The states that enter with the first document of a call, and those that leave after its last one.

    Give a new one to the first call (``Cut.states``); its :meth:`next` enters the following call. ``position``: how
    many tokens of the first document came before, in all rows or in each (:meth:`joined`). All ranks give and get the
    same states, and the same, whole gradients of them. States belong to the layers that kept them: a copy of the model,
    or the same in another process, is given them by name (:meth:`saved`, :meth:`restored`), and a layer that finds none
    of its own raises ValueError.
    """

    def __init__(self, entering: dict[Key, Tensor] | None = None, position: int | Sequence[int] = 0) -> None:
        self.entering = dict(entering or {})
        self.leaving: dict[Key, Tensor] = {}
        self.positions = (position,) if isinstance(position, int) else tuple(position)
        self._calls: list[tuple[int, ...]] = []
        self._left_in: dict[Key, object] = {}

    @property
    def rows(self) -> tuple[int, ...] | None:
        """How many tokens came before, row by row of the batch; None: as many in all."""
        return self.positions if len(set(self.positions)) > 1 else None

    @property
    def position(self) -> int:
        """How many tokens of the first document came before, in every row."""
        if self.rows is not None:
            raise ValueError(f"rows stand at different positions, {_few(self.positions)}: this layer takes one for all")
        return self.positions[0]

    @staticmethod
    def joined(rows: Sequence["States"]) -> "States":
        """One batch of what are batches by themselves, prompts of different lengths among them, to be decoded at once.

        The rows of the batch are those of ``rows``, one after the other. Layers whose state depends on how many tokens
        came before in another way than by their positions raise ``ValueError`` when they are called with it.
        """
        keys = list(rows[0].entering) if rows else []
        if not rows or any(set(each.entering) != set(keys) for each in rows) or not keys:
            raise ValueError("expected states of one model that have left a call: none are given, or they differ")
        positions = [place for each in rows for place in each._of_rows()]
        return States({key: _beside(key, [each.entering[key] for each in rows]) for key in keys}, positions)

    def _of_rows(self) -> tuple[int, ...]:
        batch = next(iter(self.entering.values())).shape[0]
        return self.positions if len(self.positions) == batch else self.positions * batch

    def called(self, lengths: Sequence[int]) -> None:
        """A call is made whose documents have so many tokens: every :class:`seqpar.Cut` says so."""
        if tuple(lengths) not in self._calls:
            self._calls.append(tuple(lengths))

    def enter(self, layer: nn.Module, name: str) -> Tensor | None:
        """The state called ``name`` with which ``layer`` begins; None: nothing came before.

        Raises ``ValueError`` if other layers have states and this one has none: it belongs to another model.
        """
        if self.entering and (layer, name) not in self.entering:
            raise ValueError(
                f"{type(layer).__name__} has no state called {name!r} among these, which {_owners(self.entering)} "
                "kept: they belong to another model, or to another copy of it; hand states over by name, with "
                "states.saved(model) and States.restored(model, saved)"
            )
        return self.entering.get((layer, name))

    def leave(self, layer: nn.Module, name: str, state: Tensor, during: object = None) -> None:
        """Keep what ``layer`` ends with (not again when it is recomputed in backward).

        ``during``: the call, if it is known. Raises ``ValueError`` if the layer was used in it before: one of the two
        states would be lost.
        """
        if backward_pass() is not None:
            return
        if during is not None and self._left_in.get((layer, name)) is during:
            raise ValueError(
                f"{type(layer).__name__} is used twice in one call, but keeps one state from one call to the next: "
                "use two layers with the same weights, or pass no states"
            )
        self.leaving[layer, name], self._left_in[layer, name] = state, during

    def next(self, tokens: int | Sequence[int] | None = None) -> "States":
        """For the call that continues this one.

        ``tokens``: how many the call's last document had in it, or the lengths of all its documents; they need not be
        given, as the call's :class:`seqpar.Cut` says them. Raises ``ValueError`` if they are not those of the call, or
        if a layer that had a state kept none.
        """
        lengths = self._lengths(tokens)
        lost = {key: state for key, state in self.entering.items() if key not in self.leaving}
        if lost and self._calls:
            raise ValueError(f"{_owners(lost)} had states but kept none: the call was one of another model")
        before = self.positions if len(lengths) <= 1 else (0,)
        return States(self.leaving, [each + (lengths[-1] if lengths else 0) for each in before])

    def detach(self) -> "States":
        """The same numbers, through which no gradient goes back."""
        return States({key: state.detach() for key, state in self.entering.items()}, self.positions)

    def saved(self, model: nn.Module) -> dict[str, Tensor]:
        """The entering states by the names of the layers in ``model``, to be stored or given to a copy of it."""
        names = {layer: name for name, layer in model.named_modules()}
        foreign = {key: state for key, state in self.entering.items() if key[0] not in names}
        if foreign:
            raise ValueError(f"{_owners(foreign)} kept states but are not in this {type(model).__name__}")
        found = {f"{names[layer]}/{name}": state for (layer, name), state in self.entering.items()}
        return {POSITION: torch.tensor(self.positions if self.rows else self.position), **found}

    @staticmethod
    def restored(model: nn.Module, saved: Mapping[str, Tensor]) -> "States":
        """What :meth:`saved` gave, for the layers that have these names in ``model``.

        Raises ``ValueError`` for names of layers that are not there.
        """
        layers, entering = dict(model.named_modules()), {}
        for key, state in saved.items():
            where, _, name = key.rpartition("/")
            if key != POSITION and where not in layers:
                raise ValueError(f"there is no layer {where!r} in this {type(model).__name__}, for the state {name!r}")
            if key != POSITION:
                entering[layers[where], name] = state
        return States(entering, saved[POSITION].tolist())

    def _lengths(self, tokens: int | Sequence[int] | None) -> tuple[int, ...]:
        """Of the documents of the call."""
        if tokens is None and len(self._calls) == 1:
            return self._calls[0]
        if tokens is None:
            raise ValueError(f"say the lengths of the call's documents: {len(self._calls)} calls had these states")
        given = (tokens,) if isinstance(tokens, int) else tuple(tokens)
        if not self._calls:
            return given
        fitting = [each for each in self._calls if each == given or (isinstance(tokens, int) and each[-1:] == given)]
        if len({len(each) > 1 for each in fitting}) != 1:
            raise ValueError(f"tokens must be those of the call, {' or '.join(map(str, self._calls))}, got {tokens}")
        return fitting[0]


def _beside(key: Key, states: Sequence[Tensor]) -> Tensor:
    """Of all rows; of fewer keys and values the first are none, which nobody sees."""
    layer, name = key
    if len({state.shape[1:] for state in states}) == 1:
        return torch.cat(list(states))
    if name != KEYS_AND_VALUES:
        raise ValueError(f"{type(layer).__name__} keeps more of more tokens: rows of different lengths do not join")
    longest = max(state.shape[1] for state in states)
    none = [state.new_zeros(state.shape[0], longest - state.shape[1], *state.shape[2:]) for state in states]
    return torch.cat([torch.cat(both, 1) for both in zip(none, states)])


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


def _owners(states: Mapping[Key, Tensor]) -> str:
    kinds = sorted({type(layer).__name__ for layer, _ in states})
    return f"{len(states)} states' layers ({', '.join(kinds)})" if len(states) > 1 else f"a {kinds[0]}"
