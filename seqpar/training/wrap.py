"""``@sequence_parallel``: cuts the batch, tells the layers where they stand, and owns gradient summation."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from seqpar.collectives import Group, Ranks, connect, group_of
from seqpar.collectives.agreed import tell_of_errors
from seqpar.collectives.group import where
from seqpar.collectives.scan import ALGORITHMS
from seqpar.crossing.attention import TRANSPORTS
from seqpar.crossing.replicated import scale_gradient
from seqpar.offload.runtime.activations import Plan
from seqpar.offload.runtime.tiers import Tier
from seqpar.ops.choice import IMPLEMENTATIONS
from seqpar.ops.compiling import apart
from seqpar.sharding.agreement import digest, lengths_fingerprint, text_fingerprint
from seqpar.sharding.chance import refuse_own_random_numbers
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import LAYOUTS, Shard
from seqpar.training.aliases import GradientSum
from seqpar.training.alike import Alike, is_distributed
from seqpar.training.classes import cut_class, wrapper_of
from seqpar.training.foreign import fitted
from seqpar.training.gradients import Averaged, check_distributed, check_meshes
from seqpar.training.inputs import Call, Lengths, batch_of
from seqpar.training.output import Output as Output
from seqpar.training.output import opened
from seqpar.training.passes import Found, Given, Loss, Pass, Wanted, head_of
from seqpar.training.rows import per_row
from seqpar.training.swapping import AUTO, Swapping
from seqpar.training.vocabulary import check_vocabulary

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Options:
    """How a model is cut."""

    layout: str = "contiguous"
    transport: str = "ring"
    scan: str = "all_gather"
    sync_gradients: bool = True
    loss_tokens: int = 0
    impl: str = "auto"
    token_dims: tuple[tuple[str, int | None], ...] = ()

    def cut(self, lengths: Sequence[int], group: Group) -> Cut:
        """The cut of documents of these lengths over a group."""
        return Cut(Shard.of(lengths, group, self.layout), group, self.transport, self.scan, impl=self.impl)

    def check(self, who: str) -> None:
        """Raise ``ValueError`` for an option that does not exist."""
        for name, value, known in (
            ("layout", self.layout, LAYOUTS),
            ("transport", self.transport, TRANSPORTS),
            ("scan", self.scan, ALGORITHMS),
            ("impl", self.impl, IMPLEMENTATIONS),
        ):
            if value not in known:
                raise ValueError(f"{who}: {name} must be one of {', '.join(known)}, got {value!r}")
        if self.loss_tokens < 0:
            raise ValueError(f"{who}: loss_tokens must be 0 (all) or more, got {self.loss_tokens}")


class SequenceParallel(nn.Module):
    """A model whose sequence is cut over the ranks of a group; made by :func:`sequence_parallel`."""

    def __init__(
        self,
        module: nn.Module,
        group: Group,
        options: Options,
        swap: Swapping | None = None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        options.check(where(group))
        _check_wrapped_once(module, group)
        module = fitted(module, group)
        check_takes_a_cut(module.forward, type(module).__name__, where(group))
        self.module = module
        self.swap = swap
        self.loss = loss
        self.group = group
        self.options = options
        self.alike = Alike(module)
        self.gradient_sum = GradientSum(module)

    @apart
    def forward(
        self,
        tokens: Tensor | None = None,
        labels: Tensor | None = None,
        lengths: Lengths | None = None,
        *,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        attention_mask: Tensor | None = None,
        divisor: float | Tensor | None = None,
        **inputs: Any,
    ) -> Output:
        """Call with the same global batch on every rank.

        ``tokens [b, s]`` int64, or ``[b, s, ...]`` of what else is read; ``labels [b, s]``, not shifted, -100 where
        there is nothing to predict; ``lengths``: the documents packed one after the other in each row (one document, if
        not given), or a list of them for each row.

        ``targets [b, s, ...]``, instead of labels: what to predict at each token, not shifted. ``weights [b, s]``: what
        each label or target counts. ``attention_mask [b, s]``: 0 where a row is padded, on either side. ``divisor``:
        what the summed loss is divided by (default: the number of targets, or the sum of their weights). ``inputs``: by
        name, for the model's forward; what is ``[b, s, ...]`` is cut, a :class:`seqpar.Packed` is cut along its own
        documents, and the rest goes through as it is.
        """
        if not self.options.sync_gradients:
            check_meshes(self, self.group)
        call = Call(tokens, labels, lengths, targets, weights, attention_mask, divisor, inputs)
        averaged = Averaged.of(self.module, self.group) if self.group.size > 1 else []
        said = " and ".join(each.compared() for each in averaged)
        self._agree(call, {"what DDP averages over": (text_fingerprint(said), said or "no DDP")})
        for each in averaged:
            each.check(self.group, self.options.sync_gradients)
        batch = batch_of(call, dict(self.options.token_dims), where(self.group))
        self._check_batch(batch.tokens, batch.labels)
        cut = self.options.cut(batch.lengths, self.group)
        device = next((each.device for each in self.module.parameters()), torch.device("cpu"))
        wanted = Wanted.of(batch, cut, device)
        with tell_of_errors(self.group, f"call {self.alike.calls} of the model"), self.swapping(cut) as cut:
            found = self._run(Given.of(batch, cut), cut, wanted)
        num = None if wanted is None else wanted.num_targets
        dims = dict(self.options.token_dims)
        return Output(found.loss, found.outputs, cut.shard, found.loss_sum, num, found.auxiliary, batch.rows, dims)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model inside, with the arguments of ``torch.compile``: checks and messages stay as they are."""
        self.module.compile(*args, **kwargs)

    def swapping(self, cut: Cut) -> AbstractContextManager[Cut]:
        """A context that gives the cut to run the module with, in which its activations are swapped if they are to."""
        return nullcontext(cut) if self.swap is None else self.swap.over(cut)

    def _run(self, given: Given, cut: Cut, wanted: Wanted | None) -> Found:
        """My outputs and the loss, with gradients that will be summed over the ranks."""
        leave = self._summed if self.options.sync_gradients else self._scaled
        return Pass(self.module, self.options.loss_tokens, self.loss, leave)(given, cut, wanted)

    def _summed(self, run: Callable[[], Any]) -> Any:
        return self.gradient_sum.of(self.group, run)

    def _scaled(self, run: Callable[[], Any]) -> Any:
        """DDP and FSDP2 average over the joint mesh; ranks that share a sequence are to be summed."""
        outputs, rebuild = opened(run())
        return rebuild([_scaled(each, self.group.size) for each in outputs])

    def __getstate__(self) -> Any:
        if self.group.size > 1:
            raise ValueError(f"{where(self.group)}: a group of ranks is not saved: save module.state_dict() instead")
        return super().__getstate__()

    def __copy__(self) -> "SequenceParallel":
        twin = object.__new__(type(self))
        twin.__dict__ = dict(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceParallel":
        memo[id(self.group)] = self.group  # a group is no data
        twin = memo[id(self)] = copy.copy(self)
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def check(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        lengths: Sequence[int],
        also: Mapping[str, tuple[int, str]] = MappingProxyType({}),
    ) -> None:
        """Raise ``ValueError``, the same on every rank, if ranks have other batches, options, modes or weights, are not
        at the same call, or if the batch does not fit together. ``also``: what else must be the same, as fingerprints
        with descriptions. What is compared when: :class:`seqpar.training.alike.Alike`."""
        call = Call(tokens, labels, list(lengths))
        self._agree(call, also)
        batch_of(call, {}, where(self.group))
        self._check_batch(tokens, labels)

    def _agree(self, call: Call, also: Mapping[str, tuple[int, str]] = MappingProxyType({})) -> None:
        """The same ``ValueError`` on every rank, whatever a rank was called with. Nothing else may raise before it."""
        if self.group.size == 1:
            return
        tokens, labels, lengths = call.tokens, call.labels, call.said_lengths
        options, read = str(self.options), _digested(tokens)
        facts = {
            "the options": (text_fingerprint(options), options),
            "the batch's tokens": read,
            "the batch's labels": read if labels is tokens else _digested(labels),
            "the batch's lengths": (lengths_fingerprint(lengths), lambda: _shortened(lengths)),
            "the batch's other inputs": call.other_inputs(),
            **also,
        }
        given = torch.device("cpu") if tokens is None else tokens.device
        self.alike.check(facts, self.group, next((p.device for p in self.module.parameters()), given))

    def _check_batch(self, tokens: Tensor | None, labels: Tensor | None) -> None:
        who = where(self.group)
        if tokens is not None and not tokens.is_floating_point():
            check_vocabulary(self.module, tokens, labels, who)
        if self.options.loss_tokens and head_of(self.module) is None:
            raise ValueError(f"{who}: loss_tokens needs a model with a head whose logits its forward returns")
        if is_distributed(self.module):
            check_distributed(self.module, self.options.sync_gradients, who)
        refuse_own_random_numbers(self.module, self.group)


def _scaled(output: Any, size: int) -> Any:
    if size == 1 or not isinstance(output, Tensor) or not output.requires_grad:
        return output
    return scale_gradient(output, size)


def check_takes_a_cut(forward: Callable[..., Any], name: str, who: str) -> None:
    """Raise ``ValueError`` if a model's forward has no place for the cut."""
    parameters = inspect.signature(forward).parameters.values()
    places = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if "cut" in (each.name for each in parameters) or any(each.kind == each.VAR_POSITIONAL for each in parameters):
        return
    if len(places) < 2:
        raise ValueError(
            f"{who}: {name}.forward({', '.join(map(str, parameters))}) takes no cut, so its layers cannot know which "
            "tokens they hold: write forward(tokens, cut), and hand the cut to the layers that mix tokens (those of "
            "seqpar.layers, or calls such as seqpar.attention(q, k, v, shard=cut.shard, group=cut.group))"
        )


def _check_wrapped_once(module: nn.Module, group: Group) -> None:
    """Raise ``ValueError`` if a part of the model cuts the sequence already."""
    for name, part in module.named_modules():
        if isinstance(part, SequenceParallel) or (part is not module and wrapper_of(part) is not part):
            which = f"its part {name!r}" if name else "the model"
            raise ValueError(f"{where(group)}: {which} is wrapped already: sequence_parallel wraps a model once")


def _digested(x: Tensor | None) -> tuple[Tensor | int, str]:
    return (0, "none") if x is None else (digest(x), f"shape {list(x.shape)}, {x.dtype}")


def _shortened(lengths: Sequence[Any]) -> str:
    shown = ", ".join(str(each)[:80] for each in lengths[:6])
    if per_row(lengths):
        return f"[{shown}{', ...' if len(lengths) > 6 else ''}], {len(lengths)} rows"
    return f"[{shown}{', ...' if len(lengths) > 6 else ''}], {len(lengths)} documents, {sum(lengths)} tokens"


class Decorator(Protocol):
    """What ``sequence_parallel`` with options and without a target gives."""

    @overload
    def __call__(self, target: type[M], /) -> type[M]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, target: nn.Module, /) -> SequenceParallel: ...
    @overload
    def __call__(self, target: Callable[..., nn.Module], /) -> Callable[..., SequenceParallel]: ...


@overload
def sequence_parallel(target: type[M], *,  # type: ignore[overload-overlap]
                      group: Ranks | None = ..., layout: str = ..., transport: str = ...,
                      scan: str = ..., sync_gradients: bool = ...,
                      loss_tokens: int = ..., impl: str = ..., swap: "Plan | str | None" = ...,
                      swap_tier: Tier | None = ..., loss: Loss | None = ...,
                      token_dims: Mapping[str, int | None] = ...) -> type[M]: ...  # fmt: skip
@overload
def sequence_parallel(target: nn.Module, *, group: Ranks | None = ..., layout: str = ..., transport: str = ...,
                      scan: str = ..., sync_gradients: bool = ...,
                      loss_tokens: int = ..., impl: str = ..., swap: "Plan | str | None" = ...,
                      swap_tier: Tier | None = ..., loss: Loss | None = ...,
                      token_dims: Mapping[str, int | None] = ...) -> SequenceParallel: ...  # fmt: skip
@overload
def sequence_parallel(target: Callable[..., nn.Module], *, group: Ranks | None = ..., layout: str = ...,
                      transport: str = ..., scan: str = ..., sync_gradients: bool = ...,
                      loss_tokens: int = ..., impl: str = ..., swap: "Plan | str | None" = ...,
                      swap_tier: Tier | None = ..., loss: Loss | None = ...,
                      token_dims: Mapping[str, int | None] = ...) -> Callable[..., SequenceParallel]: ...  # fmt: skip
@overload
def sequence_parallel(target: None = ..., *, group: Ranks | None = ..., layout: str = ..., transport: str = ...,
                      scan: str = ..., sync_gradients: bool = ...,
                      loss_tokens: int = ..., impl: str = ..., swap: "Plan | str | None" = ...,
                      swap_tier: Tier | None = ..., loss: Loss | None = ...,
                      token_dims: Mapping[str, int | None] = ...) -> Decorator: ...  # fmt: skip


def sequence_parallel(
    target: Any = None,
    *,
    group: Ranks | None = None,
    layout: str = "contiguous",
    transport: str = "ring",
    scan: str = "all_gather",
    sync_gradients: bool = True,
    loss_tokens: int = 0,
    impl: str = "auto",
    swap: "Plan | str | None" = None,
    swap_tier: Tier | None = None,
    loss: Loss | None = None,
    token_dims: Mapping[str, int | None] = MappingProxyType({}),
) -> Any:
    """Cut a model's sequence over the ranks of ``group``: decorate its class, a factory, or wrap an instance.

    A class stays a class (:func:`seqpar.training.classes.cut_class`); a factory and an instance give a
    :class:`SequenceParallel`, whose ``module`` is the model.

    Law: the same model, the same batch, the same numbers: the loss, and after ``backward()`` every gradient, are those
    of one device, for every ``layout``, ``transport`` and ``scan``.

    The model's ``forward(tokens, cut)`` gets my tokens ``[b, t]`` and a :class:`seqpar.Cut`, hands the cut to the
    layers that mix tokens, and returns logits ``[b, t, vocabulary]``. The wrapped model is called with the global
    batch, the same on every rank: ``model(tokens, labels=labels, lengths=lengths)``, and returns an :class:`Output`.

    ``group``: default :func:`seqpar.collectives.connect` when the model is made. ``layout``: see
    :meth:`seqpar.Shard.of`; ``transport``: see :func:`seqpar.attention`; ``scan``: see :func:`seqpar.linear_attention`.
    ``sync_gradients=False`` leaves summation to DDP or FSDP2 over the joint mesh of data and sequence ranks: they
    average over its ranks, so gradients are scaled by ``group.size`` where the module's outputs leave it, and that
    average is the gradient of one device, for any loss on them. ``loss_tokens``: compute the loss of so many tokens at
    a time (0: of all), so that logits and their gradients are never all there; the model then has ``hidden(tokens,
    cut)`` and ``head``, and :class:`Output` no logits. ``impl``: what computes on each device: ``"triton"`` kernels,
    the ``"reference"`` in torch, or ``"auto"``. ``swap``: activations leave the device for ``swap_tier`` (default: host
    memory) by this plan or these shares, see :func:`seqpar.offload.activations`; ``"auto"`` plans
    from what the first step of each length shows.

    ``loss(outputs, targets, weights)``: of my tokens, in place of cross-entropy: a sum, of which ``weights [b, t]``, 0
    where there is no target, are factors; it is summed over ranks and divided once. With ``loss_tokens`` it gets the
    outputs of so many tokens. ``token_dims``: which dim of an input or an output, by its name, holds tokens (None: it
    holds none), where ``[b, s, ...]`` does not say so.

    Raises ``ValueError``, the same on every rank, for unknown options, a batch or weights that differ between ranks,
    and shapes that do not fit. One small all-gather per call makes sure.
    """
    options = Options(layout, transport, scan, sync_gradients, loss_tokens, impl, tuple(token_dims.items()))
    options.check("sequence_parallel")
    if isinstance(swap, str) and swap != AUTO:
        raise ValueError(f"sequence_parallel: swap must be a plan, shares, or {AUTO!r}, got {swap!r}")

    def wrap(module: nn.Module) -> SequenceParallel:
        ranks = connect() if group is None else group_of(group)
        swapping = None if swap is None else Swapping(module, swap, swap_tier, ranks.size)
        return SequenceParallel(module, ranks, options, swapping, loss)

    if target is None:
        return lambda later: _wrap(later, wrap)
    return _wrap(target, wrap)


def _wrap(target: Any, wrap: Callable[[nn.Module], SequenceParallel]) -> Any:
    if isinstance(target, nn.Module):
        return wrap(target)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return cut_class(target, wrap)
    if not callable(target):
        raise ValueError(f"sequence_parallel takes a module, its class or a factory, got {type(target).__name__}")

    @functools.wraps(target, updated=())
    def build(*args: Any, **kwargs: Any) -> SequenceParallel:
        return wrap(target(*args, **kwargs))

    return build
