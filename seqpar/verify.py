"""One call that says whether a model, cut over ranks, still trains to the numbers of one device.

The same weights run twice on the same batch: whole (a group of one, on every rank) and cut over the group. What is
compared is named after the ways in which cutting a sequence is known to train the wrong thing without an error (S1 to
S11; a table of them is in the documentation). All of it happens on copies: the user's model is left as it was.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from collectives import Group, alone, connect
from collectives.group import where
from seqpar.agreement import check_same, fingerprint, text_fingerprint
from seqpar.findings import Finding, combine, compare_gradients, compare_losses, compare_outputs
from seqpar.findings import Report as Report
from seqpar.findings import Row as Row
from seqpar.findings import Run, leaks, moved
from seqpar.loss import next_token_targets
from seqpar.wrap import Options, SequenceParallel

_TOLERANCES = ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2))


@dataclass(frozen=True)
class Batch:
    """A global batch: ``tokens [b, s]``, ``labels [b, s]`` not shifted, and the lengths of its packed documents."""

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]


def verify(
    model: nn.Module,
    batch: Any,
    group: Group | None = None,
    *,
    layout: str | None = None,
    transport: str | None = None,
    scan: str | None = None,
    tolerance: float | None = None,
) -> Report:
    """Compare a model cut over ``group`` with itself on one device: loss, logits, every gradient, what is counted.

    Law: the report is the same on every rank, and ``model`` is untouched: weights, gradients, training mode, random
    state. ``report.ok`` says whether all rows hold; ``report.require()`` raises ``ValueError`` if not; printing it shows
    a table.

    ``model``: a module with ``forward(tokens, cut)``, or one that :func:`seqpar.sequence_parallel` has wrapped, whose
    group and options are then the defaults. ``batch``: a :class:`Batch`, a mapping or an object with ``tokens``,
    ``labels`` and ``lengths``, the same on every rank; documents of uneven lengths test most.
    ``layout``, ``transport``, ``scan``: see :func:`seqpar.sequence_parallel`.
    Runs in float64 if the layers allow it. ``tolerance``, of relative norms, is by default that of the lowest precision
    the model computes in: 1e-9 in float64, 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16. Memory: two copies.

    Raises ``ValueError`` for a batch or weights that differ between ranks or do not fit, for active dropout, and for a
    model inside DDP or FSDP.
    """
    given = {name: value for name, value in (("layout", layout), ("transport", transport), ("scan", scan)) if value}
    wrapped = isinstance(model, SequenceParallel)
    if group is None:
        group = model.group if isinstance(model, SequenceParallel) else connect()
    options = replace(model.options if isinstance(model, SequenceParallel) else Options(), **given)
    options.check(where(group))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    checked = _checked(_batch_of(batch, group), group, device)
    _check_model(model.module if isinstance(model, SequenceParallel) else model, group)

    with _random_state(device), torch.enable_grad():
        exact, seen = _exact_runs(model, checked, group, device)
        whole_model, cut_model = _copy(model, group, alone(), Options(), exact), _copy(model, group, group, options, exact)
        whole, cut = _run(whole_model, checked), _run(cut_model, checked)
        allowed = _tolerance(seen) if tolerance is None else tolerance
        findings = [
            *compare_losses(whole, cut, group, allowed),
            *compare_outputs(whole, cut, _targets(checked), allowed),
            leaks(cut_model, checked.tokens, cut, allowed),
            moved(whole_model, checked.tokens, whole, allowed),
            *compare_gradients(whole, cut, group, device, allowed),
        ]
    return Report(
        rows=combine(findings, group, device),
        ranks=group.size,
        layout=options.layout,
        transport=options.transport,
        scan=options.scan,
        precision=_name(_lowest(seen)),
        num_tokens=checked.tokens.numel(),
        lengths=checked.lengths,
        wrapped=wrapped,
    )
