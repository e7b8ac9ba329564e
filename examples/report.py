"""What rank 0 says while it trains: a header, one line per step, TensorBoard scalars, and the comparison."""

import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from corpus import Corpus
from options import Options
from ranks import Ranks
from rich.console import Console
from rich.markup import escape

from seqpar.models import build

CONSOLE = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Step:
    """What one step did: ``tokens`` of all its sequences, ``bytes_`` that rank 0 sent, ``shares``: tokens per rank."""

    number: int
    loss: float
    documents: int
    tokens: int
    seconds: float
    bytes_: int
    shares: list[int]


class Report:
    """Prints on rank 0, and is silent on the others."""

    def __init__(self, options: Options, speaks: bool) -> None:
        self._options = options
        self._speaks = speaks
        self._board = _open_board(options.logdir) if speaks and options.logdir else None

    def header(self, what: dict[str, list[str]]) -> None:
        """Names with their lines."""
        if not self._speaks:
            return
        for name, lines in what.items():
            text = escape(f"\n{'':7}".join(lines))
            CONSOLE.print(f"[bold cyan]{name:<6}[/] {text}")

    def columns(self) -> None:
        """The heads of the columns of steps."""
        if not self._speaks:
            return
        columns = f"{'step':>5} {'loss':>8} {'documents':>10} {'tokens':>8} {'tokens/s':>9} {'sent by rank 0':>15}"
        CONSOLE.print(f"\n[bold]{columns}   tokens per rank[/]")

    def step(self, step: Step) -> None:
        """One line, and three scalars."""
        if not self._speaks:
            return
        rate = step.tokens / step.seconds
        self.curves(step.number, {"loss": step.loss, "tokens per second": rate, "bytes sent": step.bytes_})
        if shown(step.number, self._options):
            CONSOLE.print(
                f"{step.number:>5} {step.loss:>8.4f} {step.documents:>10,} {step.tokens:>8,} {rate:>9,.0f} "
                f"{size(step.bytes_):>15}   [dim]{_shares(step.shares)}[/]"
            )

    def curves(self, number: int, values: Mapping[str, float]) -> None:
        """Scalars of one step for TensorBoard, by name."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, number)

    def close(self) -> None:
        """Write out what TensorBoard has not got yet."""
        if self._board is not None:
            self._board.close()
            CONSOLE.print(f"\n[dim]curves: tensorboard --logdir {self._options.logdir}[/]")


class Comparison:
    """The same steps on one rank, beside those on many."""

    def __init__(self, options: Options, losses: list[float], ranks: int) -> None:
        self._options = options
        self._losses = losses
        self._differences: list[float] = []
        CONSOLE.print("\nThe same steps again on one rank, with every sequence whole:\n")
        many = f"loss on {ranks} ranks"
        CONSOLE.print(f"[bold]{'step':>5}  {many:>16}  {'loss on 1 rank':>16}  {'difference':>10}[/]")

    def step(self, step: Step) -> None:
        """One line with both losses, and their relative difference."""
        cut = self._losses[step.number - 1]
        difference = abs(cut - step.loss) / max(abs(step.loss), 1e-30)
        # A loss that is not a number is as wrong as can be.
        self._differences.append(math.inf if math.isnan(difference) else difference)
        if shown(step.number, self._options):
            CONSOLE.print(f"{step.number:>5}  {cut:>16.7f}  {step.loss:>16.7f}  {difference:>10.1e}")

    def close(self) -> bool:
        """Print the verdict; whether both are the same."""
        worst, tolerance = max(self._differences), self._options.tolerance
        same = worst <= tolerance
        bound = f"(tolerance {tolerance:.0e} in {self._options.dtype})"
        verdict = "[bold green]the same numbers[/]" if same else "[bold red]FAILED[/]"
        CONSOLE.print(f"\n{verdict}: largest relative difference {worst:.1e} {bound}")
        if not same:
            CONSOLE.print("Some models magnify rounding errors as they train: --dtype float64 tells those from faults.")
        return same


def _shares(shares: list[int]) -> str:
    """The tokens of each rank; of many ranks the fewest and the most."""
    return " ".join(map(str, shares)) if len(shares) <= 8 else f"{min(shares)} to {max(shares)}"


def shown(number: int, options: Options) -> bool:
    """Whether this step gets a line."""
    return number % options.every == 0 or number in (1, options.steps)


def _open_board(logdir: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        CONSOLE.print("[dim]tensorboard is not installed: no curves (pip install 'seqpar[train]')[/]")
        return None
    return SummaryWriter(logdir)


def size(bytes_: int) -> str:
    """``bytes_`` for people."""
    return f"{bytes_ / 1e6:,.2f} MB" if bytes_ >= 1e5 else f"{bytes_ / 1e3:,.1f} kB"


def describe(options: Options, corpus: Corpus, ranks: Ranks) -> dict[str, list[str]]:
    """What is trained on what by whom: the header."""
    return {
        "ranks": _describe_ranks(options, ranks),
        "model": _describe_model(options),
        "text": _describe_text(corpus, options),
        "run": _describe_run(corpus, options, options.steps * ranks.num_sequences),
    }


def _describe_ranks(options: Options, ranks: Ranks) -> list[str]:
    size, many = ranks.sequence.size, ranks.num_sequences
    if options.plan:
        who = [f"{size}, cut in {options.layout} layout; who shares which document is planned batch by batch"]
    elif size == 1:
        who = [f"{many}, each with a sequence of its own" if many > 1 else "1, with every sequence whole"]
    else:
        sequences = f"each of {many} sequences at a time" if many > 1 else "each sequence"
        who = [
            f"{size} share {sequences}, cut in {options.layout} layout",
            f"keys and values travel by {options.transport}, states by {options.scan}",
        ]
    return [*who, f"on {ranks.device.type}, in {options.dtype}"]


def _describe_model(options: Options) -> list[str]:
    model = options.model
    kinds = Counter(model.names)
    layers = " + ".join(f"{count} {kind}" for kind, count in kinds.items())
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(model).parameters())
    return [f"{layers}; width {model.dim}, {model.heads} heads, {parameters / 1e6:.2f} M parameters"]


def _describe_text(corpus: Corpus, options: Options) -> list[str]:
    sizes = sorted(file.size for file in corpus.files)
    median, p99 = statistics.median_low(sizes), sizes[int(0.99 * (len(sizes) - 1))]
    name = " ".join(options.data) or f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
    return [
        f"{name}: {len(sizes):,} documents, {size(sum(sizes))}",
        f"bytes per document: min {sizes[0]:,}, median {median:,}, p99 {p99:,}, max {sizes[-1]:,}",
    ]


def _describe_run(corpus: Corpus, options: Options, num_sequences: int) -> list[str]:
    taken = sum(document.size for sequence in corpus.step(0, num_sequences) for document in sequence)
    cut = sum(file.size > options.tokens for file in corpus.files)
    parts = [f"{cut:,} documents are longer: cut into parts that count as documents"] if cut else []
    return [
        f"{options.steps} steps read {size(taken)}, in sequences of at most {options.tokens:,} tokens (bytes)",
        *parts,
    ]
