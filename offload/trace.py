"""Every buffer of a training step, without the step's memory: sizes and lives, traced on fake tensors."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqpar.offload.placement.buffers import Buffer

KINDS = ("parameter", "gradient", "saved", "transient")


@dataclass(frozen=True)
class TracedBuffer:
    """A buffer, what it is for, and the layer in whose forward or backward pass it was made.

    ``kind``: ``"parameter"`` (buffers of modules too), ``"gradient"`` (there when the step is over), ``"saved"`` for
    backward, or ``"transient"``. ``layer``: the name of the innermost module that was running; empty outside of any.
    """

    buffer: Buffer
    kind: str
    layer: str

    @property
    def saved(self) -> bool:
        """Whether autograd kept it for backward."""
        return self.kind == "saved"


@dataclass(frozen=True)
class Trace:
    """The buffers of a step in order of birth, and how many events (births and deaths) it had."""

    buffers: tuple[TracedBuffer, ...]
    num_events: int

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at one event."""
        return max(self.live_bytes(), default=0)

    def live_bytes(self, *kinds: str) -> list[int]:
        """Bytes alive after each event, of these kinds (default: all)."""
        change = [0] * (self.num_events + 1)
        for traced in self.buffers:
            if not kinds or traced.kind in kinds:
                change[traced.buffer.birth] += traced.buffer.size
                change[traced.buffer.death] -= traced.buffer.size
        return list(accumulate(change))[: self.num_events]

    def at_peak(self) -> dict[str, int]:
        """Bytes of each kind at the event where most is alive."""
        total = self.live_bytes()
        peak = total.index(max(total)) if total else 0
        return {kind: self.live_bytes(kind)[peak] if total else 0 for kind in KINDS}

    def of_kind(self, *kinds: str) -> tuple[Buffer, ...]:
        """The buffers of these kinds that take any bytes."""
        return tuple(traced.buffer for traced in self.buffers if traced.kind in kinds and traced.buffer.size)


def trace(build: Callable[[], tuple[nn.Module, Callable[[], object]]]) -> Trace:
    """The buffers of one step, traced on a CPU where nothing is allocated and nothing is computed.

    ``build()`` makes the model and its inputs (as fake tensors: any size will do) and returns the model and the step: a
    function that runs forward and backward once. Its first statement is the first event. What a fused kernel needs
    inside of itself, and messages, are not seen; on a GPU compare with :func:`allocator_trace`.

    Raises ``ValueError`` if the step needs values that fake tensors do not have.
    """
    with FakeTensorMode():
        module, step = build()
        recorder = _Recorder(module)
        with recorder, _layers_told(module, recorder), torch.autograd.graph.saved_tensors_hooks(
            recorder.keep, lambda tensor: tensor
        ):  # fmt: skip
            try:
                step()
            except torch._subclasses.fake_tensor.DataDependentOutputException as error:
                raise ValueError(f"the step looks at values, which a trace does not have: {error}") from error
        recorder.finish(parameter.grad for parameter in module.parameters())
    return Trace(tuple(recorder.traced()), recorder.clock)


@dataclass
class _Life:
    """What is known of one storage so far."""

    size: int
    birth: int
    layer: str
    kind: str = "transient"
    death: int | None = None


class _Recorder(TorchDispatchMode):
    """Writes down when storages appear and go."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.clock = 0
        self.layers: list[str] = [""]
        self._lives: list[_Life] = []
        self._alive: dict[int, _Life] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            self.see(tensor).kind = "parameter"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: Tensor) -> _Life:
        """The life of a tensor's storage, which begins now if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            life = _Life(storage.nbytes(), self.clock, self.layers[-1])
            self.clock += 1
            self._alive[key] = life
            self._lives.append(life)
            weakref.finalize(storage, self._end, key, life)
        return self._alive[key]

    def keep(self, tensor: Tensor) -> Tensor:
        """What autograd saves; without its graph, or an output that is saved would keep itself alive."""
        life = self.see(tensor)
        if life.kind == "transient":
            life.kind = "saved"
        return tensor.detach()

    def finish(self, gradients: Iterable[Tensor | None]) -> None:
        """The step is over: what is still there dies after it."""
        for gradient in gradients:
            if gradient is not None and self.see(gradient).kind != "parameter":
                self.see(gradient).kind = "gradient"
        for life in self._lives:
            life.death = self.clock if life.death is None else life.death

    def traced(self) -> Iterator[TracedBuffer]:
        for number, life in enumerate(self._lives):
            assert life.death is not None
            buffer = Buffer(f"b{number}", life.size, life.birth, max(life.death, life.birth + 1))
            yield TracedBuffer(buffer, life.kind, life.layer)

    def _end(self, key: int, life: _Life) -> None:
        if life.death is None:
            life.death = self.clock
            self.clock += 1
        if self._alive.get(key) is life:
            del self._alive[key]


@contextmanager
def _layers_told(module: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Within, the recorder knows which module is in its forward or backward pass."""
    handles = []
    for name, part in module.named_modules():
        enter, leave = _turns(name, recorder)
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turns(name: str, recorder: _Recorder) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(*_: object) -> None:
        recorder.layers.append(name)

    def leave(*_: object) -> None:
        recorder.layers.pop()

    return enter, leave


def allocator_trace(events: Iterable[dict[str, Any]]) -> Trace:
    """The same from the history of the CUDA caching allocator: the second source.

    ``events``: those of one device in ``torch.cuda.memory._snapshot()["device_traces"]``, recorded with
    ``torch.cuda.memory._record_memory_history()``. What was there before the history began is not in it; kinds are not
    known, so all is ``"transient"``. Raises ``ValueError`` for an event without action, address or size.
    """
    lives: list[_Life] = []
    alive: dict[int, _Life] = {}
    clock = 0
    for event in events:
        try:
            action, place, size = event["action"], event["addr"], event["size"]
        except KeyError as error:
            raise ValueError(f"this is no event of the allocator: {error} is missing in {sorted(event)}") from None
        if action == "alloc":
            alive[place] = _Life(size, clock, "")
            lives.append(alive[place])
        elif action == "free_requested" and place in alive:
            alive.pop(place).death = clock
        else:
            continue
        clock += 1
    buffers = (
        Buffer(f"b{number}", life.size, life.birth, clock if life.death is None else life.death)
        for number, life in enumerate(lives)
    )
    return Trace(tuple(TracedBuffer(buffer, "transient", "") for buffer in buffers), clock)
