"""``seqpar verify``: run one model whole and cut over ranks, and compare all that training depends on.

Exit status: 0 where nothing differs, 1 where something does, 2 for input that cannot be used.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise, product
from typing import TYPE_CHECKING, Any

from seqpar.commands.arguments import count, lengths
from seqpar.commands.choices import LAYOUTS, MIXERS, SCANS, TRANSPORTS
from seqpar.commands.ranks import join, num_threads
from seqpar.commands.user_model import user_model

if TYPE_CHECKING:
    from torch import nn

    from seqpar.collectives import Group
    from seqpar.verification.comparison import Batch
    from seqpar.verification.report import Report

DESCRIPTION = (
    "Run one model whole and cut over ranks, on the same batch, and compare loss, logits, every gradient, what is "
    "counted, and what documents see of each other. Without a launcher the ranks are threads of this process; under "
    "torchrun, mpirun or srun they are its processes."
)
_SHARES = (0.17, 0.0, 0.05, 0.42, 0.01, 0.35)  # of the tokens, for documents of awkward lengths
_ROWS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar verify``; ``parser.set_defaults(run=run)`` is set as well."""
    cut = parser.add_argument_group("how to cut (default: as the model is wrapped, else the first)")
    cut.add_argument("--ranks", type=count, metavar="N", help="how many ranks (default: 4 threads, or all processes)")
    cut.add_argument("--layout", choices=LAYOUTS, help="which rank gets which tokens")
    cut.add_argument("--transport", choices=TRANSPORTS, help="how keys and values of softmax attention travel")
    cut.add_argument("--scan", choices=SCANS, help="how states of linear attention travel")
    cut.add_argument("--all", action="store_true", help="go through every layout, transport and scan, a row each")
    what = parser.add_argument_group("what to run")
    factory = "your own model: FACTORY() returns a module with forward(tokens, cut), or one that is wrapped"
    what.add_argument("--model", metavar="MODULE:FACTORY", help=factory)
    what.add_argument("--mixer", choices=MIXERS, help="linear layers of the bundled model (default: the first)")
    what.add_argument("--tokens", type=count, metavar="N", help="tokens in a row (default: 97)")
    documents = "tokens of each document packed in a row, such as 5,0,17 (default: six uneven ones)"
    what.add_argument("--lengths", type=lengths, metavar="N,N,...", help=documents)
    what.add_argument("--vocabulary", type=count, metavar="N", help="tokens are below N (default: as the embedding)")
    what.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare and show; returns the exit status. Raises ``ValueError`` with one line for what cannot be used."""
    import torch

    from seqpar.collectives import disconnect

    torch.manual_seed(0)
    model = _model(arguments).to(arguments.device)
    batch = _batch(arguments, model)
    group = join(arguments)
    try:
        reports = _reports(arguments, model, batch, group)
    finally:
        disconnect()
    if group.rank == 0:
        _show(reports, arguments)
    return 0 if all(report.ok for report in reports) else 1


def _model(arguments: argparse.Namespace) -> "nn.Module":
    if arguments.model is not None:
        return user_model(arguments.model)
    from seqpar.models import HybridConfig, HybridLM

    mixer = arguments.mixer or MIXERS[0]
    return HybridLM(HybridConfig(vocabulary=64, dim=32, layers=4, heads=4, kv_heads=2, softmax_every=2, mixer=mixer))


def _batch(arguments: argparse.Namespace, model: "nn.Module") -> "Batch":
    import torch
    from torch import nn

    from seqpar.verification.comparison import Batch

    documents = arguments.lengths or _awkward(arguments.tokens or 97)
    if arguments.tokens not in (None, sum(documents)):
        raise ValueError(f"--lengths sum to {sum(documents)}, but --tokens is {arguments.tokens}: leave one out")
    embeddings = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    vocabulary = arguments.vocabulary or next(iter(embeddings), 256)
    if embeddings and vocabulary > max(embeddings):
        raise ValueError(f"--vocabulary {vocabulary}, but the model's embedding holds {max(embeddings)} tokens")
    tokens = torch.randint(vocabulary, (_ROWS, sum(documents)))
    nothing_to_predict = torch.rand(tokens.shape) < 0.1
    return Batch(tokens, tokens.masked_fill(nothing_to_predict, -100), documents)


def _awkward(tokens: int) -> tuple[int, ...]:
    """Documents of uneven lengths, one of them empty, of ``tokens`` tokens together."""
    ends = [round(tokens * share) for share in accumulate(_SHARES, initial=0.0)]
    return tuple(end - start for start, end in pairwise(ends))


def _reports(arguments: argparse.Namespace, model: "nn.Module", batch: "Batch", group: "Group") -> "list[Report]":
    from seqpar.collectives import run_ranks
    from seqpar.verification.verify import verify

    def compare(ranks: "Group", cut: tuple[str | None, str | None, str | None]) -> "Report":
        try:
            return verify(model, batch, ranks, layout=cut[0], transport=cut[1], scan=cut[2])
        except IndexError as error:  # an embedding was asked for what it does not hold, by tokens or positions
            raise ValueError(
                f"the model failed on tokens below {int(batch.tokens.max()) + 1} in rows of {batch.tokens.shape[1]}: "
                f"{error}; --vocabulary and --lengths say what it gets"
            ) from error

    cuts = _progress(_cuts(arguments), quiet=group.rank > 0)
    if group.size > 1:
        return [compare(group, cut) for cut in cuts]
    return [run_ranks(num_threads(arguments), compare, cut)[0] for cut in cuts]


def _cuts(arguments: argparse.Namespace) -> list[tuple[Any, Any, Any]]:
    given = (arguments.layout, arguments.transport, arguments.scan)
    if not arguments.all:
        return [given]
    return list(product(*([one] if one else every for one, every in zip(given, (LAYOUTS, TRANSPORTS, SCANS)))))


def _progress(cuts: Sequence[Any], quiet: bool) -> Iterable[Any]:
    """The same, with a bar on stderr that goes away, if there is more than one and someone is looking."""
    from rich.console import Console
    from rich.progress import track

    if len(cuts) == 1 or quiet:
        return cuts
    return track(cuts, "comparing", console=Console(stderr=True), transient=True)


def _show(reports: "list[Report]", arguments: argparse.Namespace) -> None:
    from rich.console import Console

    if arguments.json:
        found = [report.as_json() for report in reports]
        print(json.dumps(found if arguments.all else found[0], indent=2))
        return
    from seqpar.verification.report import overview

    Console().print(overview(reports) if arguments.all else reports[0])
