"""One call of one layer: what it saves for backward, each storage once."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.saved import Away, Cut, Entry, Kept, Machinery, Rows, View
from seqpar.offload.runtime.segments import Made, Origin, Segment, TokenWise, Whole
from seqpar.offload.runtime.streams import Done

LAYER_INPUT = "layer_input"
BLOCK = 64
Packed = Away | Kept


@dataclass(frozen=True)
class SavedStorage:
    """What a layer left for its backward: its name, and how many bytes had which fate."""

    layer: int
    name: str
    kept_bytes: int
    swapped_bytes: int
    recomputed_bytes: int


@dataclass(frozen=True)
class Policy:
    """What is done with which storage. ``fate`` gives shares by name; what is smaller than ``smallest_bytes`` stays."""

    fate: Callable[[str], Fractions]
    smallest_bytes: int
    observe: Callable[[SavedStorage], None]


@dataclass
class _Known:
    """A storage that was seen in this call, and who holds its bytes."""

    storage: "weakref.ref[torch.UntypedStorage]"
    version: int
    entry: "weakref.ref[Entry] | None"  # None: they stay


@dataclass
class _Output:
    """A storage that a segment returned."""

    storage: "weakref.ref[torch.UntypedStorage]"
    segment: Segment
    number: int
    view: View


class _Seen:
    """The storages that were seen in one call of a layer, and where they come from. Needed while it packs only."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        first = next((x for x in tensors if x.dim() >= 2), None)
        self.shape = (1, 1) if first is None else (first.shape[0], first.shape[1])  # batch and tokens
        self.device = None if first is None else first.device
        self._inputs = storages(tensors)
        self._known: dict[int, _Known] = {}
        self._outputs: dict[int, _Output] = {}
        self._whole: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._unnamed = 0

    def find(self, tensor: Tensor) -> _Known | None:
        """What became of the bytes of a tensor. Addresses are used again, so the storage must still be that one."""
        known = self._known.get(_key(tensor))
        if known is None or known.version != tensor._version or known.storage() is not tensor.untyped_storage():
            return None
        return known

    def remember(self, tensor: Tensor, entry: Entry | None) -> None:
        """What became of the bytes of a tensor."""
        storage = weakref.ref(tensor.untyped_storage())
        self._known[_key(tensor)] = _Known(storage, tensor._version, None if entry is None else weakref.ref(entry))

    def returned(self, segment: Segment, outputs: Sequence[Tensor]) -> None:
        """What a segment returned."""
        for number, output in enumerate(outputs):
            storage = weakref.ref(output.untyped_storage())
            self._outputs[_key(output)] = _Output(storage, segment, number, View.of(output))

    def needed(self, tensor: Tensor) -> None:
        """A segment starts from this tensor, so it cannot be what makes it again."""
        self._whole[_key(tensor)] = weakref.ref(tensor.untyped_storage())

    def maker(self, tensor: Tensor) -> _Output | None:
        """The output of a segment that lies in the storage of a tensor."""
        made = self._outputs.get(_key(tensor))
        return made if made is not None and made.storage() is tensor.untyped_storage() else None

    def origin(self, tensor: Tensor, segment: Segment | None, number: int) -> tuple[str, tuple[Segment, Origin] | None]:
        """The name of a storage, and what can compute it again, if anything can."""
        if _key(tensor) in self._inputs:
            return LAYER_INPUT, None
        made = self.maker(tensor)
        if made is not None:
            dim = self._token_dim(made.view, tensor)
            name = f"{made.segment.name}.returned{made.number}"
            return name, dim and (made.segment, Origin("output", made.number, made.view, dim[0]))
        whole = self._whole.get(_key(tensor))
        if segment is None or (whole is not None and whole() is tensor.untyped_storage()):
            self._unnamed += 1
            return f"mixed{self._unnamed - 1}", None
        dim = self._token_dim(View.of(tensor), tensor)
        name = f"{segment.name}.saved{number}"
        return name, dim and (segment, Origin("saved", number, View.of(tensor), dim[0]))

    def _token_dim(self, view: View, tensor: Tensor) -> tuple[int] | None:
        batch, tokens = self.shape
        bytes_ = tensor.untyped_storage().nbytes()
        if tokens < 1 or batch < 1 or bytes_ % (batch * tokens):
            return None
        dim = view.token_dim(batch, tokens, bytes_ // (batch * tokens))
        return None if dim is None else (dim,)


@dataclass(eq=False)
class Run:
    """One call of a layer. Held by what it saved, so it lives as long as the graph does."""

    layer: int
    machinery: Machinery
    policy: Policy
    begins_backward: "Callable[[Run], None]"
    previous: "weakref.ref[Run] | None" = None
    untouched: frozenset[int] = frozenset()  # storages of parameters and buffers
    writes: list[Done] = field(default_factory=list)
    _entries: "list[weakref.ref[Entry]]" = field(default_factory=list)
    _segments: "weakref.WeakSet[Segment]" = field(default_factory=weakref.WeakSet)
    _seen: _Seen = field(default_factory=lambda: _Seen([]))
    _segment: Segment | None = None

    # --- forward

    def begin(self, tensors: Sequence[Tensor], fixed: frozenset[int]) -> None:
        """The call begins, with these inputs; ``fixed`` are the storages of parameters and buffers."""
        self._seen, self.untouched = _Seen(tensors), fixed

    def saved_anything(self) -> bool:
        """Whether anything has left."""
        return bool(self._entries)

    def end(self) -> None:
        """The call is over: what only packing needs is let go."""
        self._seen, self._segment = _Seen([]), None

    def pack(self, tensor: Tensor) -> Packed:
        """Called for every tensor that autograd saves, in order."""
        segment, number = self._segment, -1
        if segment is not None:
            number = segment.num_saved
            segment.num_saved += 1
        with torch.no_grad():
            return self._pack(tensor, segment, number)

    def _pack(self, tensor: Tensor, segment: Segment | None, number: int) -> Packed:
        if not self._may_leave(tensor):
            return Kept(tensor)
        known = self._seen.find(tensor)
        if known is not None and known.entry is None:
            return Kept(tensor)
        entry = None if known is None or known.entry is None else known.entry()
        if entry is None:
            entry = self._store(tensor, *self._seen.origin(tensor, segment, number))
        return Kept(tensor) if entry is None else Away(entry, View.of(tensor), self)

    def _may_leave(self, tensor: Tensor) -> bool:
        if (
            type(tensor) not in (Tensor, nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.device != self._seen.device
        ):
            return False
        bytes_ = tensor.untyped_storage().nbytes()
        large = bytes_ >= self.policy.smallest_bytes and bytes_ % tensor.dtype.itemsize == 0
        return large and _key(tensor) not in self.untouched and not isinstance(tensor, nn.Parameter)

    def _store(self, tensor: Tensor, name: str, again: tuple[Segment, Origin] | None) -> Entry | None:
        """Cut the storage as the policy says; None if all of it stays."""
        bytes_ = tensor.untyped_storage().nbytes()
        batch, tokens = self._seen.shape
        rows = Rows(batch, tokens, bytes_ // (batch * tokens)) if again else Rows(1, bytes_, 1)
        cut = _cut(self.policy.fate(name), rows.tokens, again is not None)
        per_token = rows.batch * rows.width
        kept, computed = cut.kept - cut.swapped, rows.tokens - cut.kept
        self.policy.observe(
            SavedStorage(self.layer, name, kept * per_token, cut.swapped * per_token, computed * per_token)
        )
        if cut.swapped == 0 and cut.kept == rows.tokens:
            self._seen.remember(tensor, None)
            return None
        tail = None
        if again is not None and computed:
            segment, origin = again
            segment.want(origin, computed)
            tail = _Tail(segment, origin, rows, cut.kept)
        entry = Entry(tensor, rows, cut, self.machinery, tail)
        self._entries.append(weakref.ref(entry))
        if entry.left is not None:
            self.writes.append(entry.left)
        self._seen.remember(tensor, entry)
        return entry

    # --- segments

    def call(self, name: str, function: TokenWise, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs of a token-wise function, which may be run again for some of the tokens."""
        if not all(x.dim() > 2 and tuple(x.shape[:2]) == self._seen.shape for x in inputs):
            return function(slice(None), *inputs)
        made = [self._made(x) for x in inputs]
        for x, known in zip(inputs, made):
            if known is None:
                self._seen.needed(x)
        segment = self._segment = Segment(name, function, inputs, made)
        try:
            outputs = function(slice(None), *inputs)
        finally:
            self._segment = None
        if not segment.num_saved:  # somebody else packs what is saved here, as activation checkpointing does
            return outputs
        with torch.no_grad():
            segment.sources = tuple(known or Whole(self._pack(x, None, -1)) for known, x in zip(made, inputs))
        self._segments.add(segment)
        self._seen.returned(segment, outputs)
        return outputs

    def _made(self, tensor: Tensor) -> Made | None:
        """The output of another segment that a tensor is, if it is one."""
        made = self._seen.maker(tensor)
        return Made(made.segment, made.number) if made is not None and made.view == View.of(tensor) else None

    # --- backward

    def used(self) -> None:
        """Something that this call saved is wanted."""
        self.begins_backward(self)

    def load(self) -> None:
        """Start to bring everything back, in the order in which backward wants it."""
        for entry in reversed(list(self._living())):
            entry.load()

    def evict(self) -> None:
        """Let the device memory of everything go; it can come back again."""
        for entry in self._living():
            entry.evict()
        for segment in list(self._segments):
            segment.forget()

    def leave(self) -> None:
        """What follows finds everything of this call in the tier; raises if it could not be written."""
        while self.writes:
            self.writes.pop(0).wait()

    def _living(self) -> Iterator[Entry]:
        for reference in self._entries:
            entry = reference()
            if entry is not None:
                yield entry

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within, what autograd saves is packed here."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack):
            yield


@dataclass(frozen=True)
class _Tail:
    segment: Segment
    origin: Origin
    rows: Rows
    first: int

    def __call__(self) -> Tensor:
        return self.segment.tail(self.origin, self.rows, self.first)


def _unpack(packed: Packed) -> Tensor:
    with torch.no_grad():
        return packed.get()


def storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    """The storages of tensors, as numbers."""
    return frozenset(_key(tensor) for tensor in tensors)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _cut(fate: Fractions, tokens: int, can_compute: bool) -> Cut:
    """Shares as whole tokens; what cannot be computed again is swapped instead."""
    computed = round(fate.recompute * tokens) if can_compute else 0
    if tokens - computed > BLOCK:  # matrix products work in blocks of rows: those of the tail should be the same blocks
        computed = tokens - (tokens - computed) // BLOCK * BLOCK if computed else 0
    swapped = round((fate.swap if can_compute else fate.swap + fate.recompute) * tokens)
    return Cut(min(swapped, tokens - computed), tokens - computed)
