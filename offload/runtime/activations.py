"""Activations that leave the device layer by layer and come back, or are computed again, when backward wants them."""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seqpar.offload.planning.strategies import Fractions
from seqpar.offload.runtime.runs import Policy, Run, SavedStorage, storages
from seqpar.offload.runtime.saved import Buffers, Machinery
from seqpar.offload.runtime.segments import TokenWise
from seqpar.offload.runtime.streams import Lane, lanes_for
from seqpar.offload.runtime.tiers import HostTier, Tier

SMALLEST_BYTES = 1 << 16


class Shares(Protocol):
    """A plan: the fate of each saved tensor, by name. :class:`seqpar.offload.SwapPlan` is one."""

    @property
    def fractions(self) -> tuple[tuple[str, Fractions], ...]:
        """Names and shares."""
        ...


Plan = Shares | Mapping[str, Fractions] | Fractions


def activations(
    model: nn.Module,
    plan: Plan,
    *,
    tier: Tier | None = None,
    layers: Sequence[nn.Module] | None = None,
    keep_last: int = 1,
    smallest_bytes: int = SMALLEST_BYTES,
    lanes: tuple[Lane, Lane] | None = None,
) -> "Activations":
    """Swap what the layers of ``model`` save for backward, while the model runs within this context.

    Law: loss and gradients are bitwise those without it (where tokens are computed again: as far as the kernels give
    the same bits for some rows as for all). Use it as often as you like; backward may come later, outside of it::

        swap = activations(model, plan, tier=FileTier(folder))
        for batch in batches:
            with swap:
                loss = model(batch)
            loss.backward()
        swap.close()

    ``plan``: shares for each saved tensor by name, or the same shares for all; a name that the plan lacks gets the
    mean of its shares. ``tier``: default host memory. ``layers``: default the longest ``nn.ModuleList``; the first
    tensor that a layer gets is ``[batch, tokens, ...]``. ``keep_last`` layers stay on the device. Storages below
    ``smallest_bytes`` stay, as do parameters and buffers; every other storage leaves once however many views of it are
    saved. Shares that cannot be computed again (layer inputs, what mixes tokens) are swapped instead. After Zhao et
    al. 2024 (MEMO, arXiv 2407.12117). Raises ``ValueError`` for what does not fit, and whatever a full tier raises.
    """
    chosen = _longest_list(model) if layers is None else list(layers)
    if not keep_last >= 0:
        raise ValueError(f"keep_last must not be negative, got {keep_last}")
    if smallest_bytes < 1:
        raise ValueError(f"smallest_bytes must be at least 1, got {smallest_bytes}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    store = HostTier(pinned=device.type == "cuda") if tier is None else tier
    machinery = Machinery(store, *(lanes or lanes_for(device)), Buffers())
    return Activations(model, chosen, _fates(plan), machinery, keep_last, smallest_bytes)


def _longest_list(model: nn.Module) -> list[nn.Module]:
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of layers: name them by layers=")
    return max(lists, key=len)


def _fates(plan: Plan) -> Callable[[str], Fractions]:
    if isinstance(plan, Fractions):
        return lambda name: plan
    known = dict(plan) if isinstance(plan, Mapping) else dict(plan.fractions)
    if not known:
        raise ValueError("a plan must name at least one saved tensor")
    for name, shares in known.items():
        if min(shares.keep, shares.swap, shares.recompute) < 0 or abs(sum(_tuple(shares)) - 1) > 1e-6:
            raise ValueError(f"the shares of {name!r} must be at least 0 and sum to 1, got {shares}")
    mean = Fractions(*(sum(column) / len(known) for column in zip(*map(_tuple, known.values()))))
    return lambda name: known.get(name, mean)


def _tuple(shares: Fractions) -> tuple[float, float, float]:
    return shares.keep, shares.swap, shares.recompute


class Activations:
    """The context that :func:`activations` makes. One forward pass at a time, in the thread that entered it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        fate: Callable[[str], Fractions],
        machinery: Machinery,
        keep_last: int,
        smallest_bytes: int,
    ) -> None:
        self.machinery = machinery
        self._model, self._layers, self._keep_last = model, list(layers), keep_last
        self._observed: list[SavedStorage] = []
        self._policy = Policy(fate, smallest_bytes, self._observed.append)
        self._handles: list[Any] = []
        self._thread: int | None = None
        self._depth: list[tuple[nn.Module, Run | None, AbstractContextManager[None] | None]] = []
        self._last: weakref.ref[Run] | None = None
        self._backward: weakref.ref[Run] | None = None
        self._arrived: list[weakref.ref[Run]] = []
        self._task = -1
        self._leaving: deque[Run] = deque()
        self._fixed: frozenset[int] = frozenset()

    def __enter__(self) -> "Activations":
        if self._handles:
            raise ValueError("this context is entered already: use one for each model and rank")
        self._thread = threading.get_ident()
        self._observed.clear()
        self._fixed = storages([*self._model.parameters(), *self._model.buffers()])
        self._let_go()
        for layer in dict.fromkeys(self._layers):
            before = layer.register_forward_pre_hook(self._begin, with_kwargs=True)
            after = layer.register_forward_hook(self._end, always_call=True)
            self._handles += [before, after]
        return self

    def __exit__(self, *error: object) -> None:
        while self._depth:
            self._pop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._thread = None
        while self._leaving:
            self._leaving.popleft()

    def close(self) -> None:
        """Finish all copies and give the tier back. What was swapped and not used yet is lost."""
        self.machinery.leaving.close()
        self.machinery.returning.close()
        self.machinery.tier.close()
        self.machinery.buffers.clear()

    @property
    def layers(self) -> list[nn.Module]:
        """The layers whose activations may leave."""
        return list(self._layers)

    @property
    def saved(self) -> tuple[SavedStorage, ...]:
        """What the layers of the last forward pass left for backward, by storage."""
        return tuple(self._observed)

    def token_wise(self, name: str, function: TokenWise, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``function(slice(None), *inputs)``; a layer calls its token-wise parts through this.

        ``function(rows, *inputs)`` gets tensors ``[batch, tokens, ...]`` of the tokens ``rows``, treats every token by
        itself, draws no random numbers, and returns a tuple of such tensors. Then shares of what it saves and returns
        can be computed again.
        """
        run = self._depth[-1][1] if self._depth and self._thread == threading.get_ident() else None
        if run is None or not torch.is_grad_enabled() or in_backward():
            return function(slice(None), *inputs)
        return run.call(name, function, inputs)

    # --- forward

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._thread != threading.get_ident():
            return
        index = self._layers.index(layer)
        if not torch.is_grad_enabled() or in_backward() or index >= len(self._layers) - self._keep_last:
            self._depth.append((layer, None, None))
            return
        while len(self._leaving) > 1:  # two layers may be on their way at a time
            self._leaving.popleft().leave()
        run = Run(index, self.machinery, self._policy, self.begins, self._last)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        run.begin(tensors, self._fixed | storages([*layer.parameters(), *layer.buffers()]))
        hooks = run.hooks()
        hooks.__enter__()
        self._depth.append((layer, run, hooks))

    def _end(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._thread != threading.get_ident() or not any(layer is entered for entered, *_ in self._depth):
            return
        while self._depth[-1][0] is not layer:
            self._pop()
        run = self._pop()
        if run is not None and run.saved_anything():
            self._last = weakref.ref(run)
            self._leaving.append(run)
        if self._last is not None and torch.is_grad_enabled():
            _announce(output, _Tell(weakref.ref(self), self._last, run is not None and run.saved_anything()))

    def _pop(self) -> Run | None:
        _, run, hooks = self._depth.pop()
        if run is not None and hooks is not None:
            hooks.__exit__(None, None, None)
            run.end()
        return run

    # --- backward

    def begins(self, run: Run, itself: bool = True) -> None:
        """The backward of a run begins, or (not ``itself``) of what comes after it.

        Its bytes are wanted, those of the run before soon, all others no more.
        """
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._task):
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)
        if self._backward is not None and self._backward() is run:
            return
        earlier = run.previous() if run.previous is not None and itself else None
        self._let_go(run, earlier)
        self._backward = weakref.ref(run) if itself else None
        for wanted in (run, earlier):
            if wanted is not None:
                self._arrived.append(weakref.ref(wanted))
                wanted.load()

    def _let_go(self, *but: Run | None) -> None:
        """Nothing that came back stays, but that of ``but``. At the end of a backward pass and before a forward."""
        arrived = [run for run in (reference() for reference in self._arrived) if run is not None]
        for run in arrived:
            if run not in but:
                run.evict()
        self._arrived = [weakref.ref(run) for run in dict.fromkeys(arrived) if run in but]
        if not but:
            self._backward, self._task = None, -1
            self.machinery.buffers.clear()


class _Tell:
    """The hook of a layer's output."""

    def __init__(self, owner: "weakref.ref[Activations]", run: "weakref.ref[Run]", itself: bool) -> None:
        self._owner, self._run, self._itself = owner, run, itself

    def __call__(self, gradient: Tensor) -> None:
        owner, run = self._owner(), self._run()
        if owner is not None and run is not None:
            owner.begins(run, self._itself)


def _announce(output: Any, tell: _Tell) -> None:
    """Have the gradient of a layer's output say that the layer's backward begins."""
    for tensor in output if isinstance(output, tuple | list) else [output]:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(tell)


def in_backward() -> bool:
    """Whether this runs inside a backward pass, as recomputation does."""
    return bool(torch._C._current_graph_task_id() != -1)
