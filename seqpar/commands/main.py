"""The ``seqpar`` command: verify that a cut model trains to the numbers of one device, plan who shares which document,
measure what groups cost, list layers, and see what is installed.

Exit status: 0 when all is well, 1 when ``verify`` found a difference, 2 for input that cannot be used.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise, product
from typing import TYPE_CHECKING, Any

import offload.place_cli
import planner.cli
from seqpar import calibrate_cli, layers_cli, memory_cli
from seqpar.arguments import Parser, count

if TYPE_CHECKING:
    from torch import nn

    from collectives import Group
    from seqpar.comparison import Batch
    from seqpar.report import Report

_SHARES = (0.17, 0.0, 0.05, 0.42, 0.01, 0.35)  # of the tokens, for documents of awkward lengths
_ROWS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the process, if not given); returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (ValueError, ImportError) as error:
        print(f"seqpar {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="seqpar",
        description="Train on very long sequences, cut over many GPUs, to the same numbers as one device.",
        epilog="Exit status: 0 all is well, 1 a difference was found, 2 input that cannot be used.",
    )
    parser.add_argument("--version", action="version", version=f"seqpar {importlib.metadata.version('seqpar')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_verify(commands.add_parser(
        "verify",
        help="compare a cut model with itself on one device",
        description="Run one model whole and cut over ranks, on the same batch, and compare loss, logits, every "
        "gradient, what is counted, and what documents see of each other. Without a launcher the ranks are threads of "
        "this process; under torchrun, mpirun or srun they are its processes.",
    ))  # fmt: skip
    for name, module, summary in (
        ("plan", planner.cli, "decide who shares which document of a batch"),
        ("calibrate", calibrate_cli, "measure what groups of ranks cost here, for plan"),
        ("memory", memory_cli, "plan what fills the devices and the host in a step"),
        ("layers", layers_cli, "list the layers there are, and what crosses a cut"),
        ("place", offload.place_cli, "give buffers addresses, and say how far from optimal that is"),
    ):
        module.add_arguments(commands.add_parser(name, help=summary, description=module.DESCRIPTION))
    doctor = commands.add_parser(
        "doctor",
        help="show what this machine has, and what for",
        description="Show the versions, devices, backends, optional packages and memory limits that seqpar finds, and "
        "what each missing one would be needed for. Nothing that is missing is an error.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_verify(parser: argparse.ArgumentParser) -> None:
    from collectives.scan import ALGORITHMS
    from seqpar.attention import TRANSPORTS
    from seqpar.models.hybrid import MIXERS
    from seqpar.shard import LAYOUTS

    cut = parser.add_argument_group("how to cut (default: as the model is wrapped, else the first)")
    cut.add_argument("--ranks", type=count, metavar="N", help="how many ranks (default: 4 threads, or all processes)")
    cut.add_argument("--layout", choices=LAYOUTS, help="which rank gets which tokens")
    cut.add_argument("--transport", choices=TRANSPORTS, help="how keys and values of softmax attention travel")
    cut.add_argument("--scan", choices=ALGORITHMS, help="how states of linear attention travel")
    cut.add_argument("--all", action="store_true", help="go through every layout, transport and scan, a row each")
    what = parser.add_argument_group("what to run")
    factory = "your own model: FACTORY() returns a module with forward(tokens, cut), or one that is wrapped"
    what.add_argument("--model", metavar="MODULE:FACTORY", help=factory)
    what.add_argument("--mixer", choices=tuple(MIXERS), help="linear layers of the bundled model (default: the first)")
    what.add_argument("--tokens", type=count, metavar="N", help="tokens in a row (default: 97)")
    lengths = "tokens of each document packed in a row, such as 5,0,17 (default: six uneven ones)"
    what.add_argument("--lengths", type=_lengths, metavar="N,N,...", help=lengths)
    what.add_argument("--vocabulary", type=count, metavar="N", help="tokens are below N (default: as the embedding)")
    what.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_verify)


def _lengths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, such as 5,0,17, got {text!r}")
    return tuple(map(int, parts))


def _doctor(arguments: argparse.Namespace) -> int:
    from seqpar.doctor import examine, show

    items = examine()
    print(json.dumps([asdict(item) for item in items], indent=2)) if arguments.json else show(items)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from collectives import connect, disconnect

    torch.manual_seed(0)
    model = _model(arguments).to(arguments.device)
    batch = _batch(arguments, model)
    group = connect("nccl" if arguments.device == "cuda" else "gloo")
    if group.size > 1 and arguments.ranks not in (None, group.size):
        raise ValueError(f"--ranks {arguments.ranks}, but {group.size} processes were started: leave --ranks out")
    try:
        reports = _reports(arguments, model, batch, group)
    finally:
        disconnect()
    if group.rank == 0:
        _show(reports, arguments)
    return 0 if all(report.ok for report in reports) else 1


def _model(arguments: argparse.Namespace) -> "nn.Module":
    if arguments.model is not None:
        return _from_user(arguments.model)
    from seqpar.models import HybridConfig, HybridLM
    from seqpar.models.hybrid import MIXERS

    mixer = arguments.mixer or next(iter(MIXERS))
    return HybridLM(HybridConfig(vocabulary=64, dim=32, layers=4, heads=4, kv_heads=2, softmax_every=2, mixer=mixer))


def _from_user(target: str) -> "nn.Module":
    from torch import nn

    place, _, name = target.partition(":")
    if not place or not name:
        raise ValueError(f"--model is MODULE:FACTORY, such as mymodel:build, got {target!r}")
    sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(place), name, None)
    except ImportError as error:
        raise ValueError(f"--model {target}: cannot import {place}: {error}") from error
    if not callable(factory):
        raise ValueError(f"--model {target}: module {place} has no function or class {name}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {target}: {name}() must return a torch module, got {type(model).__name__}")
    return model


def _batch(arguments: argparse.Namespace, model: "nn.Module") -> "Batch":
    import torch
    from torch import nn

    from seqpar.comparison import Batch

    lengths = arguments.lengths or _awkward(arguments.tokens or 97)
    if arguments.tokens not in (None, sum(lengths)):
        raise ValueError(f"--lengths sum to {sum(lengths)}, but --tokens is {arguments.tokens}: leave one out")
    embeddings = (part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding))
    vocabulary = arguments.vocabulary or next(embeddings, 256)
    tokens = torch.randint(vocabulary, (_ROWS, sum(lengths)))
    nothing_to_predict = torch.rand(tokens.shape) < 0.1
    return Batch(tokens, tokens.masked_fill(nothing_to_predict, -100), lengths)


def _awkward(tokens: int) -> tuple[int, ...]:
    """Documents of uneven lengths, one of them empty, of ``tokens`` tokens together."""
    ends = [round(tokens * share) for share in accumulate(_SHARES, initial=0.0)]
    return tuple(end - start for start, end in pairwise(ends))


def _reports(arguments: argparse.Namespace, model: "nn.Module", batch: "Batch", group: "Group") -> "list[Report]":
    from collectives import run_ranks
    from seqpar.verify import verify

    def compare(ranks: "Group", cut: tuple[str | None, str | None, str | None]) -> "Report":
        return verify(model, batch, ranks, layout=cut[0], transport=cut[1], scan=cut[2])

    cuts = _progress(_cuts(arguments), quiet=group.rank > 0)
    if group.size > 1:
        return [compare(group, cut) for cut in cuts]
    return [run_ranks(arguments.ranks or 4, compare, cut)[0] for cut in cuts]


def _cuts(arguments: argparse.Namespace) -> list[tuple[Any, Any, Any]]:
    from collectives.scan import ALGORITHMS
    from seqpar.attention import TRANSPORTS
    from seqpar.shard import LAYOUTS

    given = (arguments.layout, arguments.transport, arguments.scan)
    if not arguments.all:
        return [given]
    return list(product(*([one] if one else every for one, every in zip(given, (LAYOUTS, TRANSPORTS, ALGORITHMS)))))


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
    from seqpar.report import overview

    Console().print(overview(reports) if arguments.all else reports[0])
