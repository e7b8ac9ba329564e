"""The first thing that differs between a cut step and that of one device, in one line."""

from collections.abc import Sequence

from seqpar.verification.report import GRADIENT, Modules, Row

RUNS, BEFORE, AFTER = "two runs alike", "weights before the step", "weights after the step"
EVERYWHERE = "loss on every rank"
_CLOSE = 1e-3


def cause(rows: Sequence[Row], modules: Modules | None, ranks: int) -> str:
    """What differs first, in the order of a step: weights, modules, loss, gradients, weights again. "" if nothing."""
    failed = {row.name: row for row in rows if not row.ok}
    if not failed:
        return ""
    first = modules.first if modules is not None else None
    where = f", first in {first.name} ({first.kind})" if first is not None else ""
    if RUNS in failed:
        return f"random numbers: two runs of one device differ{where}: use seqpar.layers.Dropout or cut.random(layer)"
    if BEFORE in failed:
        return f"weights before the step: {failed[BEFORE].detail}: seed every rank alike, load the same checkpoint"
    if first is not None:
        if first.input_differs:
            who = first.name.rpartition(".")[0] or "the model"
            return f"{who} computes what goes into {first.name} ({first.kind}) otherwise on a cut sequence"
        return f"{first.name} ({first.kind}) gives other numbers on a cut sequence"
    for name, words in _DOCUMENTS:
        if name in failed:
            return f"{words}: {failed[name].detail}"
    return _of_the_loss(failed, ranks) or _of_the_gradient(failed, ranks)


_DOCUMENTS = (
    ("documents apart", "packed documents see each other"),
    ("documents anywhere", "positions go on over documents, or something else depends on a document's place"),
)


def _of_the_loss(failed: dict[str, Row], ranks: int) -> str:
    if EVERYWHERE in failed:
        return (
            "loss: each rank has another number, so something is summed or averaged over my tokens only: use "
            "sequence_parallel(loss=...) or seqpar.sum_over_ranks"
        )
    if "loss" not in failed:
        return ""
    ratio = failed["loss"].number
    if abs(ratio - ranks) < _CLOSE:
        return f"loss: {ranks} times that of one device, as many as there are ranks: a sum over ranks of what is whole"
    return f"loss: {failed['loss'].detail}: a wrong divisor, shifted or lost targets, a mean of means"


def _of_the_gradient(failed: dict[str, Row], ranks: int) -> str:
    size, apart = failed.get("size of the gradient"), failed.get("gradients on every rank")
    if apart is not None:
        return (
            "gradients: ranks have different ones, so nobody sums them over the ranks that share a sequence: leave "
            "sync_gradients on, or let DDP or FSDP2 span the joint mesh"
        )
    if size is not None and abs(size.number - ranks) < _CLOSE:
        return f"gradients: {ranks} times too large, as many as there are ranks: summed twice, or scaled by the ranks"
    if size is not None and abs(size.number * ranks - 1) < _CLOSE:
        return f"gradients: {ranks} times too small, as many as there are ranks: averaged where they are whole already"
    wrong = [name for name in failed if name.startswith(GRADIENT)]
    if wrong:  # the last one is the nearest to the loss
        return (
            f"{wrong[-1]} is wrong though all outputs are right: something between it and the loss is detached, or "
            "crosses ranks without a backward pass"
        )
    if AFTER in failed:
        return f"weights after the step: {failed[AFTER].detail}: the optimizer does something else on some ranks"
    name, row = next(iter(failed.items()))
    return f"{name}: {row.detail or row.guards_against}"
