"""One call that says whether a model, cut over ranks, still trains to the numbers of one device.

The same weights run twice on the same batch: whole (a group of one, on every rank) and cut over the group. What is
compared bears the names S1 to S11 of the ways in which cutting a sequence is known to train the wrong thing without
an error. All of it happens on copies: the user's model is left as it was.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seqpar.collectives import Group, Ranks, alone, connect, group_of
from seqpar.collectives.group import where
from seqpar.hf.fitted import Fitted, run
from seqpar.hf.guard import compare_with_alone
from seqpar.sharding.agreement import check_same, fingerprint, text_fingerprint
from seqpar.training.alike import Alike
from seqpar.training.classes import wrapper_of
from seqpar.training.passes import Loss
from seqpar.training.wrap import Options, SequenceParallel
from seqpar.verification.cause import cause
from seqpar.verification.comparison import Batch as Batch
from seqpar.verification.comparison import Run, compare
from seqpar.verification.modules import compare_modules
from seqpar.verification.report import Report as Report
from seqpar.verification.report import Row as Row
from seqpar.verification.steps import Make, Step, compare_steps, innermost

Module = TypeVar("Module", bound=nn.Module)

_TOLERANCES = ((torch.bfloat16, 5e-2), (torch.float16, 1e-2), (torch.float32, 1e-4), (torch.float64, 1e-9))


def verify(
    model: "nn.Module | Make",
    batch: Any,
    group: Ranks | None = None,
    *,
    layout: str | None = None,
    transport: str | None = None,
    scan: str | None = None,
    tolerance: float | None = None,
    loss: Loss | None = None,
    step: Step | None = None,
    reference: str | None = None,
) -> Report:
    """Compare a model cut over ``group`` with itself on one device: loss, logits, every gradient, what is counted.

    Law: the report is the same on every rank, and ``model`` stays as it is: weights, gradients, training mode, random
    state. ``report.ok`` says whether all rows hold, ``report.require()`` raises ``ValueError`` if not, and printing it
    shows a table. Where a row does not hold, ``report.modules.first`` is the first module whose output differs.

    ``model``: a module with ``forward(tokens, cut)``, or one that :func:`seqpar.sequence_parallel` has wrapped, whose
    group and options are then the defaults. ``batch``: a :class:`Batch`, a mapping or an object with ``tokens``,
    ``labels`` and ``lengths``, the same on every rank; several documents of uneven lengths test most.
    ``layout``, ``transport``, ``scan``: see :func:`seqpar.sequence_parallel`. With ``sync_gradients=False`` the
    gradients are averaged over the ranks first, as DDP or FSDP2 would.

    Runs in float64 if the layers can. ``tolerance`` bounds relative norms; by default it is that of the lowest
    precision that the model computes in: 1e-9 for float64, 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16.
    Every rank holds two copies of the model and the logits of all tokens. ``reference="hf"``, for a model of
    transformers: its logits are compared with those of transformers itself, each document alone, too, since both sides
    of the cut may leave the same thing out.

    ``loss``: of one's own, as for :func:`seqpar.sequence_parallel`. ``step(model, batch)``: a step of one's own, which
    returns its loss, whatever it does besides: it is run twice on one device and once cut, with what ``model`` is
    wrapped in, and loss, gradients and weights after it are compared; the batch is handed to it as it is. There
    ``model`` may be a function ``model(group)`` that makes what is trained on these ranks, wrapped and inside DDP or
    FSDP2 over whatever mesh: called with a group of one, it makes the model of one device. ``report.cause`` names the
    first thing that differs; it is the first line of the report.

    Raises ``ValueError`` for a tolerance that is negative or not finite, for a batch or weights that differ between
    ranks or do not fit, for active dropout, and for a model inside DDP or FSDP that was not made by such a function.
    """
    model = wrapper_of(model)
    wrapped = model if isinstance(model, SequenceParallel) else None
    group = group_of(group) if group is not None else wrapped.group if wrapped else connect()
    own = wrapped.options if wrapped else Options()
    options = replace(
        own,
        layout=layout or own.layout,
        transport=transport or own.transport,
        scan=scan or own.scan,
        loss_tokens=0,  # logits are compared, so all of them are needed
    )
    options.check(where(group))
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"{where(group)}: tolerance must be a finite number of at least 0, got {tolerance}")
    own_loss = loss if loss is not None or wrapped is None else wrapped.loss
    if step is not None or own_loss is not None or not isinstance(model, nn.Module):
        return _verify_step(model, batch, group, options, own_loss, step, tolerance)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    data = _checked(_batch_of(batch, group), group, device)
    _check_model(wrapped.module if wrapped else model, group)
    with _same_random_state(device), torch.enable_grad():
        whole_model, whole, lowest = _exact_or_own(model, data, group, device)
        cut_model = _cut(model, group, options, _is_exact(whole_model))
        allowed = dict(_TOLERANCES)[lowest] if tolerance is None else tolerance
        rows = compare(whole_model, whole, cut_model, _run(cut_model, data), data, allowed)
        rows += _referred(cut_model, data, group, reference)
        equal = all(row.ok for row in rows)  # the same on every rank
        modules = None if equal else compare_modules(whole_model, cut_model, data, allowed)
    return Report(
        rows,
        ranks=group.size,
        layout=options.layout,
        transport=options.transport,
        scan=options.scan,
        precision=str(lowest).removeprefix("torch."),
        num_tokens=data.tokens.numel(),
        num_documents=sum(length > 0 for length in data.lengths),
        modules=modules,
        cause=cause(rows, modules, group.size),
    )


def _verify_step(
    model: Any,
    batch: Any,
    group: Group,
    options: Options,
    loss: Loss | None,
    step: Step | None,
    tolerance: float | None,
) -> Report:
    """The same of a step of one's own."""

    def make(ranks: Group) -> nn.Module:
        module = _twin(innermost(model), getattr(wrapper_of(model), "group", None)).double()
        module.zero_grad()
        return SequenceParallel(module, ranks, options if ranks.size > 1 else Options(), None, loss)

    if isinstance(model, nn.Module):
        _check_model(innermost(model), group)
    data = batch if step is not None else _batch_of(batch, group)
    made = make if isinstance(model, nn.Module) else model
    with _same_random_state(torch.device("cpu")), torch.enable_grad():
        rows, modules, dtype = compare_steps(made, step or _usual_step, data, group, tolerance)
    precision = str(dtype).removeprefix("torch.")
    named = {"layout": options.layout, "transport": options.transport, "scan": options.scan, "precision": precision}
    tokens, documents = _sizes(data)
    return Report(
        rows,
        ranks=group.size,
        **named,
        num_tokens=tokens,
        num_documents=documents,
        modules=modules,
        cause=cause(rows, modules, group.size),
    )


def _usual_step(model: Any, data: Batch) -> Tensor:
    loss: Tensor = model(data.tokens, labels=data.labels, lengths=data.lengths).loss
    return loss


def _sizes(data: Any) -> tuple[int, int]:
    """Tokens and documents, as far as a batch says so."""
    get = data.get if isinstance(data, Mapping) else lambda name: getattr(data, name, None)
    tokens, lengths = get("tokens"), get("lengths")
    return tokens.numel() if isinstance(tokens, Tensor) else 0, len(lengths) if lengths is not None else 1


# What came, and whether it can be compared.


def _batch_of(batch: Any, group: Group) -> Batch:
    fields: list[Any] = []
    for name in ("tokens", "labels", "lengths"):
        value = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
        if value is None and name != "lengths":
            kind = type(batch).__name__
            raise ValueError(f"{where(group)}: a batch has tokens, labels and lengths, this {kind} has no {name}")
        fields.append(value)
    tokens, labels, lengths = fields
    return Batch(tokens, labels, tuple(int(n) for n in (tokens.shape[-1:] if lengths is None else lengths)))


def _checked(data: Batch, group: Group, device: torch.device) -> Batch:
    """The batch on ``device``; ``ValueError``, the same on every rank, if it is not one batch or does not fit."""
    facts = {
        "the batch's tokens": (fingerprint(data.tokens), f"shape {list(data.tokens.shape)}"),
        "the batch's labels": (fingerprint(data.labels), f"shape {list(data.labels.shape)}"),
        "the batch's lengths": (text_fingerprint(str(data.lengths)), f"{len(data.lengths)} documents"),
    }
    check_same(facts, group, device)
    who, shape = where(group), list(data.tokens.shape)
    if len(shape) != 2 or not data.tokens.numel():
        raise ValueError(f"{who}: tokens must be [batch, tokens] and not empty, got {shape}")
    if list(data.labels.shape) != shape:
        raise ValueError(f"{who}: labels must be {shape} like tokens, got {list(data.labels.shape)}")
    if min(data.lengths, default=0) < 0 or sum(data.lengths) != shape[1]:
        raise ValueError(f"{who}: lengths must be at least 0 and sum to {shape[1]} tokens, got {list(data.lengths)}")
    if sum(length > 0 for length in data.lengths) > 1 and len(data.tokens.unique()) == 1:
        raise ValueError(f"{who}: all tokens are {data.tokens[0, 0]}, but to see documents leak takes different ones")
    return replace(data, tokens=data.tokens.to(device), labels=data.labels.to(device))


def _check_model(module: nn.Module, group: Group) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{where(group)}: the model has no parameter with requires_grad: there is nothing to compare")
    if isinstance(module, nn.parallel.DistributedDataParallel) or any(
        hasattr(parameter, "device_mesh") for parameter in module.parameters()
    ):
        raise ValueError(f"{where(group)}: verify the model before DDP or FSDP wraps it")
    for name, part in module.named_modules():
        if part.training and _drops(part):
            raise ValueError(
                f"{where(group)}: {name or 'the model'} ({type(part).__name__}) drops values at random, so no two runs "
                "are equal: set its p to 0, or call model.eval()"
            )


def _drops(part: nn.Module) -> bool:
    names = ("p",) if isinstance(part, nn.modules.dropout._DropoutNd) else ("dropout", "dropout_p", "attention_dropout")
    return any(isinstance(rate := getattr(part, name, None), float | int) and rate > 0 for name in names)


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _referred(cut_model: SequenceParallel, data: Batch, group: Group, reference: str | None) -> tuple[Row, ...]:
    """What the library that a model is from says of its logits."""
    module = cut_model.module
    if reference is None:
        return ()
    if reference != "hf" or not isinstance(module, Fitted):
        raise ValueError(
            f"{where(group)}: reference must be None, or 'hf' for a model of transformers, got {reference!r} for a "
            f"{type(module).__name__}"
        )
    cut = cut_model.options.cut(data.lengths, group)
    found, allowed = compare_with_alone(module.model, run, data.tokens, cut)
    detail = f"first module that differs: {found.module} ({found.kind})" if found.module else ""
    return (Row("transformers", "what both sides leave out", found.error, allowed, found.error <= allowed, detail),)


# The two runs.


class _Watch(TorchFunctionMode):
    """Sees in which floating dtypes a model computes; a tensor without numbers is no computation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {torch.float64}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                self.seen.add(value.dtype)
        return result


def _exact_or_own(
    model: nn.Module, data: Batch, group: Group, device: torch.device
) -> tuple[SequenceParallel, Run, torch.dtype]:
    """The whole model and its run: in float64, or in its own precision where the layers of any rank cannot."""
    exact, run = _whole(model, exact=True), None
    with _Watch() as watch:
        try:
            run = _run(exact, data)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            run = None  # an error that has nothing to do with float64 will come again below
    failed = torch.tensor([float(run is None)], device=device)
    if run is None or group.all_reduce(failed).wait().item():
        exact = _whole(model, exact=False)
        with _Watch() as watch:
            run = _run(exact, data)
    return exact, run, next(dtype for dtype, _ in _TOLERANCES if dtype in watch.seen)


def _is_exact(model: nn.Module) -> bool:
    return all(parameter.dtype == torch.float64 for parameter in model.parameters() if parameter.is_floating_point())


def _whole(model: nn.Module, exact: bool) -> SequenceParallel:
    """A copy of the model that is not cut."""
    module = model.module if isinstance(model, SequenceParallel) else model
    twin = SequenceParallel(_twin(module, getattr(model, "group", None)), alone(), Options())
    return twin.double() if exact else twin


def _cut(model: nn.Module, group: Group, options: Options, exact: bool) -> SequenceParallel:
    """A copy of the model, cut over ``group``; a wrapper of the user's own making is copied as it is."""
    if isinstance(model, SequenceParallel):
        twin = _twin(model, model.group)
        twin.group, twin.options, twin.alike = group, options, Alike(twin.module)
    else:
        twin = SequenceParallel(_twin(model, group), group, options)
    return twin.double() if exact else twin


def _twin(module: Module, shared: Any) -> Module:
    """A deep copy, but for ``shared``: a group is no data."""
    try:
        return copy.deepcopy(module, {id(shared): shared})
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"verify works on copies, but copy.deepcopy of the model failed: {error}") from error


def _run(model: SequenceParallel, data: Batch) -> Run:
    """One forward and backward pass."""
    output = model(data.tokens, labels=data.labels, lengths=data.lengths)
    output.logits.retain_grad()
    output.loss.backward()
    # The loss depends on a token's logits if the token has a target: the gradient counts them.
    counted = (output.logits.grad != 0).any(-1).to(torch.int32)
    trained = [(name, each) for name, each in model.module.named_parameters() if each.requires_grad]
    gradients = {name: _averaged(parameter, model) for name, parameter in trained}
    logits = output.shard.gather(output.logits.detach())
    return Run(output.loss.detach(), logits, output.shard.gather(counted).bool(), gradients, output.shard)


def _averaged(parameter: Tensor, model: SequenceParallel) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
    if model.options.sync_gradients:
        return gradient
    return model.group.all_reduce(gradient).wait() / model.group.size
