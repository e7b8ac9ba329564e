"""How :func:`seqpar.verify` compares two runs of one model: row by row, and the same rows on every rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.collectives import Group
from seqpar.sharding.agreement import fingerprint, weights_fingerprint
from seqpar.sharding.shard import Shard
from seqpar.training.wrap import SequenceParallel
from seqpar.verification.report import GRADIENT, Row

_TINY = 1e-300
_FLOOR = 1e-4  # a parameter's gradient is compared with its own norm, but no less than this part of the norm of all
_IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A global batch: ``tokens [b, s]``, ``labels [b, s]`` not shifted, and the lengths of its packed documents."""

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]

    @property
    def documents(self) -> list[range]:
        """Where each document's tokens are."""
        ends = [sum(self.lengths[: number + 1]) for number in range(len(self.lengths))]
        return [range(end - length, end) for end, length in zip(ends, self.lengths)]

    def document_of(self, token: int) -> int:
        """Which document holds ``token``."""
        return next(number for number, tokens in enumerate(self.documents) if token in tokens)


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass gave: everyone's logits, which tokens had a target, every gradient."""

    loss: Tensor
    logits: Tensor
    counted: Tensor
    gradients: dict[str, Tensor]
    shard: Shard


@dataclass(frozen=True)
class Finding:
    """A row as one rank sees it; ``say`` turns ``number`` of the worst rank into the reason why it fails."""

    name: str
    guards_against: str
    value: float
    tolerance: float
    number: float = 0.0
    say: Callable[[float], str] = lambda number: ""


def compare(
    whole_model: SequenceParallel, whole: Run, cut_model: SequenceParallel, cut: Run, data: Batch, tolerance: float
) -> tuple[Row, ...]:
    """The rows, the same on every rank. Runs the cut model a few times more, and the whole one once."""
    group, device = cut_model.group, whole.logits.device
    findings = [
        _loss(whole, cut, tolerance),
        _alike_loss(cut, group, device),
        _logits(whole, cut, data, tolerance),
        _targets(cut, data),
        _documents_apart(cut_model, cut, data, tolerance),
        _documents_anywhere(whole_model, whole, data, tolerance),
        _alike_gradients(cut, group, device),
        *of_gradients(whole.gradients, cut.gradients, tolerance),
    ]
    return together(findings, group, device)


def together(findings: Sequence[Finding], group: Group, device: torch.device) -> tuple[Row, ...]:
    """The worst of all ranks; what is not a number is the worst there is."""
    mine = torch.tensor([[f.value, f.number] for f in findings], dtype=torch.float64, device=device)
    table = torch.stack(group.all_gather(mine.nan_to_num(nan=torch.inf)).wait()).cpu()
    rows = []
    for finding, of_ranks in zip(findings, table.unbind(1)):
        worst = int(of_ranks[:, 0].argmax())
        value, number = of_ranks[worst].tolist()
        ok = value <= finding.tolerance
        detail = "" if ok else finding.say(number)
        rows.append(Row(finding.name, finding.guards_against, value, finding.tolerance, ok, detail, number))
    return tuple(rows)


def difference(cut: Tensor, whole: Tensor, least: float = _TINY) -> float:
    """The norm of the difference over the norm of ``whole``."""
    whole = whole.double()
    return float((cut.double() - whole).norm() / whole.norm().clamp(min=least))


def _loss(whole: Run, cut: Run, tolerance: float) -> Finding:
    guards = "S4 scaled by the number of ranks, S6 tail dropped"
    ratio = float(cut.loss.double() / whole.loss.double())
    value = difference(cut.loss, whole.loss)
    return Finding("loss", guards, value, tolerance, ratio, "{:.6g} times that of one device".format)


def _alike_loss(cut: Run, group: Group, device: torch.device) -> Finding:
    guards = "S7, S8 ranks that see different batches"
    return same_numbers("loss on every rank", guards, fingerprint(cut.loss), group, device)


def same_numbers(name: str, guards: str, number: int, group: Group, device: torch.device) -> Finding:
    """How many ranks hold another number than rank 0."""
    numbers = torch.stack(group.all_gather(torch.tensor([number], device=device)).wait()).flatten().tolist()
    odd = [rank for rank, other in enumerate(numbers) if other != numbers[0]]
    say = "rank {:.0f} has other numbers than rank 0".format
    return Finding(name, guards, len(odd), 0.0, odd[0] if odd else 0, say)


def _logits(whole: Run, cut: Run, data: Batch, tolerance: float) -> Finding:
    error = (cut.logits.double() - whole.logits.double()).norm(dim=-1)
    bad = ~(error <= tolerance * whole.logits.double().norm(dim=-1).mean())
    first = int(bad.any(0).int().argmax())

    def say(number: float) -> str:
        token = int(number)
        document = data.document_of(token)
        rank = next(r for r in range(cut.shard.size) if token in cut.shard.indices_of(r))
        return f"first at position {token - data.documents[document].start} of document {document}, on rank {rank}"

    guards = "S1 mask dropped, cut ignored, S11 kernel numerics"
    return Finding("logits", guards, difference(cut.logits, whole.logits), tolerance, first, say)


def _targets(cut: Run, data: Batch) -> Finding:
    """Compares the targets that the loss saw with those that are in the labels."""
    expected = torch.zeros_like(cut.counted)
    for tokens in data.documents:
        for token in tokens[:-1]:
            expected[:, token] = data.labels[:, token + 1] != _IGNORED
    wrong = int((expected != cut.counted).sum())
    guards = "S3 labels shifted after cutting, S5 cut twice, S10 miscount"
    say = f"{{:.0f}} counted, there are {int(expected.sum())}".format
    return Finding("targets", guards, wrong, 0.0, int(cut.counted.sum()), say)


def _documents_apart(model: SequenceParallel, cut: Run, data: Batch, tolerance: float) -> Finding:
    """Changes the tokens of some documents, and looks at the logits of the others.

    Any two documents differ in a bit of their number, so changing those with that bit (then those without it) and
    looking at the others tests all pairs in few runs.
    """
    errors = torch.zeros(len(data.lengths), dtype=torch.float64)
    for changed in _halves(len(data.lengths)):
        logits = _logits_of(model, _with_other_tokens(data, changed), data.lengths)
        for number, tokens in enumerate(data.documents):
            if number not in changed and len(tokens):
                rows = slice(tokens.start, tokens.stop)
                errors[number] = max(float(errors[number]), difference(logits[:, rows], cut.logits[:, rows]))
    guards = "S2 packed documents that see each other"
    say = "document {:.0f} changed with the tokens of another one".format
    return Finding("documents apart", guards, *_worst(errors, tolerance), say)


def _worst(errors: Tensor, tolerance: float) -> tuple[float, float, float]:
    """The worst error, the tolerance, and which it is."""
    if not len(errors):
        return 0.0, tolerance, 0.0
    errors = errors.nan_to_num(nan=torch.inf)
    return float(errors.max()), tolerance, int(errors.argmax())


def _halves(count: int) -> Iterator[set[int]]:
    for bit in range((count - 1).bit_length()):
        for side in (0, 1):
            yield {number for number in range(count) if number >> bit & 1 == side}


def _with_other_tokens(data: Batch, changed: set[int]) -> Tensor:
    """Every token of the ``changed`` documents becomes another one of the tokens that are there."""
    known, places = data.tokens.unique(return_inverse=True)
    others = known.roll(1)[places]
    tokens = data.tokens.clone()
    for number in changed:
        rows = slice(data.documents[number].start, data.documents[number].stop)
        tokens[:, rows] = others[:, rows]
    return tokens


def _documents_anywhere(model: SequenceParallel, whole: Run, data: Batch, tolerance: float) -> Finding:
    """Packs the documents in reverse order, and looks whether their logits stay what they were."""
    turned = [torch.arange(tokens.start, tokens.stop) for tokens in reversed(data.documents)]
    order = torch.cat(turned).to(data.tokens.device)
    logits = torch.empty_like(whole.logits)
    logits[:, order] = _logits_of(model, data.tokens[:, order], data.lengths[::-1]).to(logits.dtype)
    errors = torch.zeros(len(data.lengths), dtype=torch.float64)
    for number, tokens in enumerate(data.documents):
        rows = slice(tokens.start, tokens.stop)
        errors[number] = difference(logits[:, rows], whole.logits[:, rows])
    guards = "S2 positions that do not restart in each document"
    say = "document {:.0f} changed with its place in the batch".format
    return Finding("documents anywhere", guards, *_worst(errors, tolerance), say)


def _logits_of(model: SequenceParallel, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    with torch.no_grad():
        output = model(tokens, lengths=lengths)
        return output.shard.gather(output.logits)


def _alike_gradients(cut: Run, group: Group, device: torch.device) -> Finding:
    guards = "gradients not summed over ranks: weights drift apart"
    number = weights_fingerprint(cut.gradients.items())
    return same_numbers("gradients on every rank", guards, number, group, device)


def of_gradients(whole: dict[str, Tensor], cut: dict[str, Tensor], tolerance: float) -> Iterator[Finding]:
    """The size of all gradients together, then each parameter's."""
    norm = float(sum(gradient.double().square().sum() for gradient in whole.values())) ** 0.5
    along = sum(float((cut[name].double() * g.double()).sum()) for name, g in whole.items())
    ratio = along / norm**2 if norm else 1.0
    guards = "S4 scaled by the number of ranks, or not summed"
    yield Finding("size of the gradient", guards, abs(ratio - 1), tolerance, ratio, "{:.6g} times its size".format)
    for name, gradient in whole.items():
        value = difference(cut[name], gradient, max(_FLOOR * norm, _TINY))
        yield Finding(GRADIENT + name, "S9 wrong backward", value, tolerance)
