"""``@sequence_parallel``: cuts the batch, tells the layers where they stand, and owns gradient summation."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from seqpar.collectives import Group, Ranks, connect, group_of
from seqpar.collectives.group import where
from seqpar.collectives.scan import ALGORITHMS
from seqpar.crossing.attention import TRANSPORTS
from seqpar.crossing.replicated import scale_gradient
from seqpar.offload.runtime.activations import Plan
from seqpar.offload.runtime.tiers import Tier
from seqpar.ops.choice import IMPLEMENTATIONS
from seqpar.sharding.agreement import digest, lengths_fingerprint, text_fingerprint
from seqpar.sharding.chance import refuse_own_random_numbers
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import LAYOUTS, Shard
from seqpar.training.aliases import GradientSum
from seqpar.training.alike import Alike, is_distributed
from seqpar.training.foreign import fitted
from seqpar.training.loss import next_token_loss, tiled_next_token_loss
from seqpar.training.swapping import AUTO, Swapping
from seqpar.training.vocabulary import check_vocabulary

T = TypeVar("T", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class Output:
    """What a wrapped model returns.

    ``loss``: the mean next-token loss of the whole batch, the same number on every rank; None without labels.
    ``logits``: of my tokens, ``[b, t, vocabulary]``; ``shard.gather(logits)`` gives everyone's. None where
    ``loss_tokens`` says that they are never all there.
    """

    loss: Tensor | None
    logits: Tensor | None
    shard: Shard


# Whoever looks for tensors in what a model returns (DistributedDataParallel, hooks of FSDP2) finds these.
pytree.register_pytree_node(
    Output,
    lambda output: ([output.loss, output.logits], output.shard),
    lambda tensors, shard: Output(*tensors, shard),  # type: ignore[call-arg]
    serialized_type_name="seqpar.Output",
)


@dataclass(frozen=True)
class Options:
    """How a model is cut."""

    layout: str = "contiguous"
    transport: str = "ring"
    scan: str = "all_gather"
    sync_gradients: bool = True
    loss_tokens: int = 0
    impl: str = "auto"

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


Leave = Callable[[Callable[[], Any]], Any]  # runs a module; what it returns leaves the module changed in some way


def as_it_is(run: Callable[[], Any]) -> Any:
    """What a module returns."""
    return run()


class Pass(nn.Module):
    """One forward pass of a model over my tokens, and its loss: what all ways of training have in common.

    ``leave`` runs what uses the model's parameters, and says what becomes of its outputs. The loss is made of these.
    """

    def __init__(self, module: nn.Module, loss_tokens: int, leave: Leave = as_it_is) -> None:
        super().__init__()
        self.module = module
        self.loss_tokens = loss_tokens
        self.leave = leave

    def forward(
        self, tokens: Tensor, labels: Tensor | None, cut: Cut, divisor: int | None = None
    ) -> tuple[Any, Tensor | None]:
        """``(logits, loss)`` of my tokens ``[b, t]`` and everyone's ``labels [b, s]``; see :func:`next_token_loss`."""
        if labels is None or not self.loss_tokens:
            logits = self.leave(lambda: self.module(tokens, cut))
            if labels is None:
                return logits, None
            return logits, next_token_loss(logits, labels, shard=cut.shard, group=cut.group, divisor=divisor)
        return None, self.leave(lambda: self._tiled(tokens, labels, cut, divisor))

    def _tiled(self, tokens: Tensor, labels: Tensor, cut: Cut, divisor: int | None) -> Tensor:
        model: Any = self.module
        x = model.hidden(tokens, cut)
        return tiled_next_token_loss(
            x, model.head, labels, tokens=self.loss_tokens, shard=cut.shard, group=cut.group, divisor=divisor
        )


class SequenceParallel(nn.Module):
    """A model whose sequence is cut over the ranks of a group; made by :func:`sequence_parallel`."""

    def __init__(self, module: nn.Module, group: Group, options: Options, swap: Swapping | None = None) -> None:
        super().__init__()
        options.check(where(group))
        _check_wrapped_once(module, group)
        module = fitted(module, group)
        self.module = module
        self.swap = swap
        self.group = group
        self.options = options
        self.alike = Alike(module)
        self.gradient_sum = GradientSum(module)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, lengths: Sequence[int] | None = None) -> Output:
        """Call with the same global batch on every rank.

        ``tokens [b, s]`` int64; ``labels [b, s]``, not shifted, -100 where there is nothing to predict; ``lengths``:
        the documents packed one after the other in each row (one document, if not given).
        """
        lengths = [tokens.shape[-1]] if lengths is None else list(lengths)
        if not self.options.sync_gradients:
            _check_meshes(self, self.group)
        self.check(tokens, labels, lengths)
        cut = self.options.cut(lengths, self.group)
        with self.swapping(cut) as cut:
            logits, loss = self._run(cut.shard.take(tokens), labels, cut)
        return Output(loss, logits, cut.shard)

    def swapping(self, cut: Cut) -> AbstractContextManager[Cut]:
        """A context that gives the cut to run the module with, in which its activations are swapped if they are to."""
        return nullcontext(cut) if self.swap is None else self.swap.over(cut)

    def _run(self, tokens: Tensor, labels: Tensor | None, cut: Cut) -> tuple[Any, Tensor | None]:
        """My logits and the loss, with gradients that will be summed over the ranks."""
        leave = self._summed if self.options.sync_gradients else self._scaled
        found: tuple[Any, Tensor | None] = Pass(self.module, self.options.loss_tokens, leave)(tokens, labels, cut)
        return found

    def _summed(self, run: Callable[[], Any]) -> Any:
        return self.gradient_sum.of(self.group, run)

    def _scaled(self, run: Callable[[], Any]) -> Any:
        """DDP and FSDP2 average over the joint mesh; ranks that share a sequence are to be summed."""
        return pytree.tree_map(self._scale, run())

    def _scale(self, output: Any) -> Any:
        if self.group.size == 1 or not isinstance(output, Tensor) or not output.requires_grad:
            return output
        return scale_gradient(output, self.group.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceParallel":
        memo[id(self.group)] = self.group  # a group is no data
        twin = copy.copy(self)
        memo[id(self)] = twin
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
        if self.group.size > 1:
            self._check_agreement(tokens, labels, lengths, also)
        self._check_batch(tokens, labels, lengths)
        refuse_own_random_numbers(self.module, self.group)

    def _check_agreement(
        self, tokens: Tensor, labels: Tensor | None, lengths: Sequence[int], also: Mapping[str, tuple[int, str]]
    ) -> None:
        facts = {
            "the options": (text_fingerprint(str(self.options)), str(self.options)),
            "the batch's tokens": (digest(tokens), f"shape {list(tokens.shape)}, {tokens.dtype}"),
            "the batch's labels": (
                0 if labels is None else digest(labels),
                "none" if labels is None else f"shape {list(labels.shape)}, {labels.dtype}",
            ),
            "the batch's lengths": (lengths_fingerprint(lengths), _shortened(lengths)),
            **also,
        }
        device = next((p.device for p in self.module.parameters()), tokens.device)
        self.alike.check(facts, self.group, device)

    def _check_batch(self, tokens: Tensor, labels: Tensor | None, lengths: Sequence[int]) -> None:
        who = where(self.group)
        if tokens.dim() != 2:
            raise ValueError(f"{who}: tokens must be [batch, tokens], got {list(tokens.shape)}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{who}: tokens must be int64 (or int32), got {tokens.dtype}: pass tokens.long()")
        if labels is not None and labels.shape != tokens.shape:
            raise ValueError(f"{who}: labels must be {list(tokens.shape)} like tokens, got {list(labels.shape)}")
        if labels is not None and labels.dtype != torch.int64:
            raise ValueError(f"{who}: labels must be int64, got {labels.dtype}: pass labels.long()")
        if sum(lengths) != tokens.shape[1]:
            raise ValueError(f"{who}: lengths sum to {sum(lengths)}, tokens hold {tokens.shape[1]}")
        check_vocabulary(self.module, tokens, labels, who)
        tileable = hasattr(self.module, "hidden") and hasattr(self.module, "head")
        if self.options.loss_tokens and not tileable:
            raise ValueError(f"{who}: loss_tokens needs a model with hidden(tokens, cut) and head, as HybridLM has")
        if self.options.sync_gradients and is_distributed(self.module):
            raise ValueError(f"{who}: under FSDP2 pass sync_gradients=False: it reduces the gradients itself")


def _check_wrapped_once(module: nn.Module, group: Group) -> None:
    """Raise ``ValueError`` if a part of the model cuts the sequence already."""
    for name, part in module.named_modules():
        if isinstance(part, SequenceParallel):
            which = f"its part {name!r}" if name else "the model"
            raise ValueError(f"{where(group)}: {which} is wrapped already: sequence_parallel wraps a model once")


def _shortened(lengths: Sequence[int]) -> str:
    shown = ", ".join(map(str, lengths[:6]))
    return f"[{shown}{', ...' if len(lengths) > 6 else ''}], {len(lengths)} documents, {sum(lengths)} tokens"


def _check_meshes(module: nn.Module, group: Group) -> None:
    """Raise ``ValueError`` if FSDP2 reduces gradients over ranks that are not all of those that share a sequence."""
    sharing = getattr(group, "global_ranks", None)
    for name, part in module.named_modules():
        if sharing is None or not hasattr(part, "set_requires_gradient_sync"):
            continue
        for mesh in _meshes(part):
            held = mesh.mesh.flatten().tolist()
            if not set(sharing) <= set(held):
                raise ValueError(
                    f"{where(group)}: FSDP2 reduces the gradients of {name or 'the model'} over ranks {held}, but "
                    f"ranks {list(sharing)} share a sequence: shard over the joint mesh of data and sequence ranks"
                )


def _meshes(part: Any) -> list[Any]:
    """Those that FSDP2 shards this part over; it alone knows while parameters are whole for the time of a call."""
    state = part._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    known = [each.mesh_info.mesh for each in groups if each is not None]
    return known or [each.device_mesh for each in part.parameters() if hasattr(each, "device_mesh")]


@overload
def sequence_parallel(target: nn.Module, *, group: Ranks | None = ..., layout: str = ..., transport: str = ...,
                      scan: str = ..., sync_gradients: bool = ...,
                      loss_tokens: int = ..., impl: str = ..., swap: "Plan | str | None" = ...,
                      swap_tier: Tier | None = ...) -> SequenceParallel: ...  # fmt: skip
@overload
def sequence_parallel(target: T, *, group: Ranks | None = ..., layout: str = ..., transport: str = ...,
                      scan: str = ..., sync_gradients: bool = ...,
                      loss_tokens: int = ..., impl: str = ..., swap: "Plan | str | None" = ...,
                      swap_tier: Tier | None = ...) -> Callable[..., SequenceParallel]: ...  # fmt: skip
@overload
def sequence_parallel(target: None = ..., *, group: Ranks | None = ..., layout: str = ..., transport: str = ...,
                      scan: str = ..., sync_gradients: bool = ...,
                      loss_tokens: int = ..., impl: str = ..., swap: "Plan | str | None" = ...,
                      swap_tier: Tier | None = ...) -> Callable[[Any], Any]: ...  # fmt: skip


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
) -> Any:
    """Cut a model's sequence over the ranks of ``group``: decorate its class, a factory, or wrap an instance.

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

    Raises ``ValueError``, the same on every rank, for unknown options, a batch or weights that differ between ranks,
    and shapes that do not fit. One small all-gather per call makes sure.
    """
    options = Options(layout, transport, scan, sync_gradients, loss_tokens, impl)
    options.check("sequence_parallel")
    if isinstance(swap, str) and swap != AUTO:
        raise ValueError(f"sequence_parallel: swap must be a plan, shares, or {AUTO!r}, got {swap!r}")

    def wrap(module: nn.Module) -> SequenceParallel:
        ranks = connect() if group is None else group_of(group)
        swapping = None if swap is None else Swapping(module, swap, swap_tier, ranks.size)
        return SequenceParallel(module, ranks, options, swapping)

    if target is None:
        return lambda later: _wrap(later, wrap)
    return _wrap(target, wrap)


def _wrap(target: Any, wrap: Callable[[nn.Module], SequenceParallel]) -> Any:
    if isinstance(target, nn.Module):
        return wrap(target)
    if not callable(target):
        raise ValueError(f"sequence_parallel takes a module, its class or a factory, got {type(target).__name__}")

    @functools.wraps(target, updated=())
    def build(*args: Any, **kwargs: Any) -> SequenceParallel:
        return wrap(target(*args, **kwargs))

    return build
