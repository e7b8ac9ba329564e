"""What groups of ranks cost on the machine at hand: a cost model for the planner, fitted to a few timed steps."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from seqpar.collectives import Group, Ranks, group_of
from seqpar.collectives.group import where
from seqpar.crossing.attention import TRANSPORTS
from seqpar.layers import SoftmaxAttention
from seqpar.planner.problem.files import costs_to_json
from seqpar.planner.problem.fit import FitError, Sample, fit
from seqpar.planner.problem.problem import ALL_TO_ALL, RING, Cluster, CostModel
from seqpar.sharding.agreement import check_same, text_fingerprint
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import Shard
from seqpar.training.device_memory import peak_bytes, saved_bytes, state_bytes, usable_bytes
from seqpar.training.loss import next_token_loss
from seqpar.training.wrap import Options, SequenceParallel

NO_TRANSPORT = "none"
SHORTEST = 16
_SHARES = (0.31, 0.04, 0.22, 0.09, 0.02, 0.18, 0.14)  # of the tokens, for documents that are packed
Kind = tuple[int, str]  # degree and transport


@dataclass(frozen=True)
class Calibration:
    """What was measured, the same on every rank; ``to_json`` is what ``seqpar plan`` reads."""

    costs: CostModel
    cluster: Cluster
    errors: tuple[FitError, ...]
    samples: tuple[Sample, ...]

    @property
    def largest_error(self) -> float:
        """How far the cost model is from the worst of its samples, relative to it."""
        return max(error.largest for error in self.errors)

    def to_json(self) -> str:
        """The cost model and the cluster, for :func:`seqpar.planner.problem.files.costs_from_json`."""
        return costs_to_json(self.costs, self.cluster)


def calibrate(
    model: nn.Module,
    group: Ranks,
    *,
    lengths: Sequence[int],
    degrees: Sequence[int] | None = None,
    transports: Sequence[str] | None = None,
    repeats: int = 3,
    vocabulary: int | None = None,
    memory_bytes: int | None = None,
    devices_per_node: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Time training steps of every degree and transport on the ranks of ``group``, and fit a cost model to them.

    Law: every rank returns the same, and ``model`` stays as it is (each rank works on a copy that shares its weights).
    As in a plan's micro-batch, all groups of a degree work at the same time, each on its own documents: forward, loss
    and backward, without the sum of gradients over groups. A sample is the median of ``repeats`` such steps after one
    that is thrown away; a step takes as long as its slowest rank. Documents change places from step to step, so that
    nothing planned for one is there for the next. For what the fit splits into which part see
    :func:`seqpar.planner.problem.fit.fit`.

    ``lengths``: tokens of a step, at least two numbers; each is timed as one document and as seven packed ones, so that
    ``s`` and ``s**2`` separate. ``degrees``: default all that divide ``group.size`` and keep to hosts.
    ``devices_per_node``: ranks of a host (default: all on one); groups of up to so many stay on it, larger ones take
    whole hosts. ``transports``: default ring, and all-to-all where softmax attention has a multiple of ``degree``
    heads. ``vocabulary``: tokens are below it; default that of the model's first embedding, else 256.
    ``memory_bytes`` of one device: default nine tenths of the rank's share of its GPU's, or of the host's. Layout and
    scan are those of a model from :func:`seqpar.sequence_parallel`, else the defaults. Memory of a token: on CUDA the
    slope of the peak over a step, elsewhere of what autograd keeps for backward, between the shortest and the longest
    document, in the kind of group where it is largest.

    ``progress(done, all)`` is called after every step; ``clock()`` tells seconds. Raises ``ValueError``, before the
    first message, for what cannot be used, and on every rank if ranks were asked different things.
    """
    group = group_of(group)
    options = model.options if isinstance(model, SequenceParallel) else Options()
    module = _twin(model.module if isinstance(model, SequenceParallel) else model, group)
    node = group.size if devices_per_node is None else devices_per_node
    _check(module, group, lengths, {"repeats": repeats, "vocabulary": vocabulary, "memory_bytes": memory_bytes,
                                    "devices_per_node": node})  # fmt: skip
    kinds = _kinds(module, group, node, degrees, transports)
    asked = f"{kinds} {list(lengths)} {repeats} {memory_bytes} {node} {options} {_shape(module)}"
    device = _device(module)
    check_same({"what to calibrate": (text_fingerprint(asked), asked[:200])}, group, device)
    tokens = _tokens(module, group, vocabulary, max(lengths))
    ranks = _Ranks(module, group, _groups(group, kinds), options, tokens, clock)
    mixes = [mix for length in sorted(set(lengths)) for mix in ((length,), _packed(length))]
    samples = _samples(ranks, kinds, mixes, repeats, progress or _silent)
    found = fit(samples)
    mine = memory_bytes or usable_bytes(device, _sharing(ranks, device))
    costs = CostModel(
        type(module).__name__, found.kinds, _bytes_per_token(ranks, kinds, lengths), float(state_bytes(module))
    )
    cluster = Cluster(_place(device, group), group.size, node, int(min(ranks.everyones(mine))))
    return Calibration(costs, cluster, found.errors, samples)


@dataclass(frozen=True, eq=False)
class _Ranks:
    """A copy of the model on one rank, its groups by degree, and the tokens that its group works on, by degree."""

    module: nn.Module
    everyone: Group
    groups: Mapping[int, Group]
    options: Options
    tokens: Callable[[int], Tensor]
    clock: Callable[[], float]

    def forward(self, kind: Kind, lengths: Sequence[int]) -> Tensor:
        """The loss of these documents, cut over my group."""
        degree, transport = kind
        group, options = self.groups[degree], self.options
        transport = options.transport if transport == NO_TRANSPORT else transport
        cut = Cut(Shard.of(lengths, group, options.layout), group, transport, options.scan)
        tokens = self.tokens(degree)[:, : sum(lengths)]
        logits = self.module(cut.shard.take(tokens), cut)
        return next_token_loss(logits, tokens, shard=cut.shard, group=group)

    def step(self, kind: Kind, lengths: Sequence[int]) -> None:
        """Forward and backward; the gradients are dropped."""
        self.forward(kind, lengths).backward()
        for parameter in self.module.parameters():
            parameter.grad = None

    def seconds(self, kind: Kind, lengths: Sequence[int]) -> float:
        """What a step takes the slowest rank; the same on every rank."""
        device = _device(self.module)
        self.everyone.all_reduce(torch.zeros(1, device=device)).wait()
        _finish(device)
        start = self.clock()
        self.step(kind, lengths)
        _finish(device)
        return max(self.everyones(self.clock() - start))

    def everyones(self, number: float) -> list[float]:
        """This number of every rank."""
        mine = torch.tensor([number], dtype=torch.float64, device=_device(self.module))
        return [float(theirs) for theirs in self.everyone.all_gather(mine).wait()]


# What is asked for, and whether it can be.


def _kinds(
    module: nn.Module, group: Group, node: int, degrees: Sequence[int] | None, transports: Sequence[str] | None
) -> tuple[Kind, ...]:
    """Every degree and transport to be timed, from small to large degree."""
    who, size = where(group), group.size
    if size % node:
        raise ValueError(f"{who}: {size} ranks are not whole nodes of {node}")
    offered = [n for n in range(1, size + 1) if size % n == 0 and (node % n if n <= node else n % node) == 0]
    for degree in degrees or ():
        if degree not in offered:
            raise ValueError(
                f"{who}: degrees must divide the {size} ranks, in nodes of {node}: {offered}, got {degree}"
            )
    for transport in transports or ():
        if transport not in TRANSPORTS:
            raise ValueError(f"{who}: transports must be of {', '.join(TRANSPORTS)}, got {transport!r}")
    if (degrees is not None and not degrees) or (transports is not None and not transports):
        raise ValueError(f"{who}: give at least one degree and one transport, or leave them out")
    wanted = {degree: _transports(module, degree, transports) for degree in sorted(set(degrees or offered))}
    return tuple((degree, transport) for degree, each in wanted.items() for transport in each)


def _transports(module: nn.Module, degree: int, wanted: Sequence[str] | None) -> tuple[str, ...]:
    if degree == 1:
        return (NO_TRANSPORT,)
    if wanted is not None:
        return tuple(dict.fromkeys(wanted))
    # A model without our layer may have softmax attention of its own: both are tried.
    heads = [layer.heads for layer in module.modules() if isinstance(layer, SoftmaxAttention)]
    return (RING, ALL_TO_ALL) if all(each % degree == 0 for each in heads) else (RING,)


def _check(module: nn.Module, group: Group, lengths: Sequence[int], counts: Mapping[str, int | None]) -> None:
    who = where(group)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{who}: the model has no parameter with requires_grad: there is no backward to time")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= SHORTEST for n in lengths):
        raise ValueError(f"{who}: lengths must be whole numbers of at least {SHORTEST} tokens, got {list(lengths)}")
    if len(set(lengths)) < 2:
        raise ValueError(f"{who}: give at least two different lengths, such as 256, 1024 and 4096; got {list(lengths)}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{who}: {name} must be at least 1, got {count}")


def _shape(module: nn.Module) -> int:
    found = [(name, tuple(each.shape), str(each.dtype)) for name, each in module.named_parameters()]
    return text_fingerprint(str(found))


# What the ranks work with.


def _twin(module: nn.Module, group: Group) -> nn.Module:
    """A copy with gradients of its own; its weights are those of the model, and take no memory again."""
    shared: dict[int, object] = {
        id(each): nn.Parameter(each.detach(), requires_grad=each.requires_grad) for each in module.parameters()
    }
    try:
        return copy.deepcopy(module, shared)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{where(group)}: calibrate works on copies, but copy.deepcopy of the model failed: {error}"
        ) from error


def _device(module: nn.Module) -> torch.device:
    return next(parameter.device for parameter in module.parameters())


def _groups(group: Group, kinds: Sequence[Kind]) -> dict[int, Group]:
    """For each degree my group of that many neighbours."""
    return {
        degree: group.partition([list(range(first, first + degree)) for first in range(0, group.size, degree)])
        for degree in sorted({degree for degree, _ in kinds})
    }


def _tokens(module: nn.Module, group: Group, vocabulary: int | None, longest: int) -> Callable[[int], Tensor]:
    """By degree, the tokens of my group: its own, and the same on all its ranks."""
    embeddings = (part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding))
    below = vocabulary or next(embeddings, 256)

    def draw(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(below, (1, longest), generator=generator).to(_device(module))

    drawn = {number: draw(number) for number in {group.rank // degree for degree in range(1, group.size + 1)}}
    return lambda degree: drawn[group.rank // degree]


def _packed(tokens: int) -> tuple[int, ...]:
    """Documents of uneven lengths, of ``tokens`` tokens together."""
    most = [max(1, int(tokens * share)) for share in _SHARES[1:]]
    return (tokens - sum(most), *most)


def _place(device: torch.device, group: Group) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{group.size}x{name}"


def _sharing(ranks: _Ranks, device: torch.device) -> int:
    """How many ranks are on my device, if all are on one host."""
    places = ranks.everyones(-1 if device.index is None else device.index)
    return places.count(places[ranks.everyone.rank])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# What is measured.


def _samples(
    ranks: _Ranks,
    kinds: Sequence[Kind],
    mixes: Sequence[tuple[int, ...]],
    repeats: int,
    progress: Callable[[int, int], None],
) -> tuple[Sample, ...]:
    """All cases round after round, so that a noisy moment touches every case alike; the first round warms up."""
    cases = [(kind, mix) for kind in kinds for mix in mixes]
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(repeats + 1):
        for index, (kind, mix) in enumerate(cases):
            places = turn % len(mix)
            seconds[index].append(ranks.seconds(kind, mix[places:] + mix[:places]))
            progress(turn * len(cases) + index + 1, (repeats + 1) * len(cases))
    return tuple(Sample(*kind, mix, median(times[1:])) for (kind, mix), times in zip(cases, seconds))


def _silent(done: int, total: int) -> None:
    pass


def _bytes_per_token(ranks: _Ranks, kinds: Sequence[Kind], lengths: Sequence[int]) -> float:
    """The largest, over ranks and kinds, of what a token more takes on its rank."""
    mine = max(_slope(ranks, kind, (min(lengths), max(lengths))) for kind in kinds)
    return max(ranks.everyones(mine))


def _slope(ranks: _Ranks, kind: Kind, lengths: tuple[int, int]) -> float:
    group, layout = ranks.groups[kind[0]], ranks.options.layout
    tokens = [Shard.of([length], group, layout).num_local for length in lengths]
    bytes_ = [_bytes_of_step(ranks, kind, length) for length in lengths]
    # Where the shorter one is too short to show, the whole of the longer one is what tokens take.
    grown, more = bytes_[1] - bytes_[0], tokens[1] - tokens[0]
    return grown / more if grown > 0 and more > 0 else bytes_[1] / max(1, tokens[1])


def _bytes_of_step(ranks: _Ranks, kind: Kind, length: int) -> int:
    device = _device(ranks.module)
    if device.type == "cuda":
        return peak_bytes(lambda: ranks.step(kind, [length]), device)
    ours = [*ranks.module.parameters(), *ranks.module.buffers()]
    return saved_bytes(lambda: ranks.forward(kind, [length]), ours)
