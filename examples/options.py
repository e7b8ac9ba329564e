"""The flags of train.py: each with what it means, checked before anything starts."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NoReturn

import torch

from seqpar.collectives.scan import ALGORITHMS
from seqpar.commands.arguments import seconds
from seqpar.crossing.attention import TRANSPORTS
from seqpar.layers.linear.linear_attention import FEATURE_MAPS
from seqpar.models import DecoderConfig, HybridConfig, build
from seqpar.models.hybrid import MIXERS
from seqpar.sharding.shard import LAYOUTS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# What one rank and many may differ by, relative to the loss: the order of sums changes the last bits, and training
# carries them on (some models magnify them: --tolerance). One rounding to the 8 bits of bfloat16 alone is 4e-3.
TOLERANCES = {"float32": 1e-4, "float64": 1e-9, "bfloat16": 2e-2}
TIMEOUT = 60.0


@dataclass(frozen=True)
class Options:
    """What the flags said."""

    model: HybridConfig | DecoderConfig
    dtype: str
    data: list[str]
    tokens: int
    longest: int | None
    steps: int
    learning_rate: float
    warm_up: int
    seed: int
    sequence_ranks: int
    plan: bool
    plan_seconds: float
    device_tokens: int
    plan_out: str
    layout: str
    transport: str
    scan: str
    threads: int
    device: str
    timeout: float
    every: int
    logdir: str
    compare: bool
    tolerance: float


@dataclass(frozen=True)
class Stop:
    """There is nothing to train: ``text`` says why; the exit code is 0 for help and 2 for what does not fit."""

    text: str
    code: int = 2

    def print(self) -> None:
        """Help goes to standard output, errors to standard error."""
        print(self.text if self.code == 0 else f"train.py: {self.text}", file=sys.stderr if self.code else sys.stdout)


def parse(arguments: Sequence[str]) -> Options | Stop:
    """The options in ``arguments``, or why not. Prints nothing, because every rank comes here."""
    parser = _parser()
    try:
        flags = parser.parse_args(arguments)
        if flags.help:
            return Stop(parser.format_help().rstrip(), 0)
        return _checked(flags)
    except ValueError as error:
        return Stop(str(error))


def _checked(flags: argparse.Namespace) -> Options:
    if flags.dim % (2 * flags.heads):
        raise ValueError(f"--heads {flags.heads} must divide --dim {flags.dim} into heads of an even size")
    if flags.kv_heads is not None and flags.heads % flags.kv_heads:
        raise ValueError(f"--kv-heads {flags.kv_heads} must divide --heads {flags.heads}")
    if flags.plan and flags.sequence_ranks:
        raise ValueError("--plan chooses who shares what, batch by batch: leave --sequence-ranks out")
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    flags.model = _model(flags)
    with torch.device("meta"):  # raises ValueError for what cannot be built
        build(flags.model)
    flags.tolerance = flags.tolerance or TOLERANCES[flags.dtype]
    return Options(**{field.name: getattr(flags, field.name) for field in fields(Options)})


def _model(flags: argparse.Namespace) -> HybridConfig | DecoderConfig:
    if flags.pattern:
        return DecoderConfig(
            pattern=flags.pattern,
            repeats=flags.repeats,
            dim=flags.dim,
            heads=flags.heads,
            checkpoint=flags.checkpoint,
        )
    return HybridConfig(
        dim=flags.dim,
        layers=flags.layers,
        heads=flags.heads,
        kv_heads=flags.kv_heads,
        softmax_every=flags.softmax_every,
        mixer=flags.mixer,
        feature_map=flags.feature_map,
        window=flags.window,
        checkpoint=flags.checkpoint,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a small language model on bytes of text, with every sequence cut over the ranks.",
        epilog="Start it with torchrun --nproc-per-node 4, mpirun -n 4, srun, or alone.",
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-h", "--help", action="store_true", default=argparse.SUPPRESS, help="show this and exit")
    parser.set_defaults(help=False)
    _add_cut(parser.add_argument_group("how the sequence is cut"))
    _add_plan(parser.add_argument_group("planning, batch by batch"))
    _add_model(parser.add_argument_group("the model"))
    _add_training(parser.add_argument_group("training"))
    _add_report(parser.add_argument_group("the report"))
    return parser


Flags = argparse._ArgumentGroup


def _add_cut(flags: Flags) -> None:
    flags.add_argument(
        "--sequence-ranks",
        type=_whole(0),
        default=0,
        metavar="N",
        help="ranks that share one sequence; the others train on other sequences at the same time (0: all share one)",
    )
    flags.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="which tokens a rank gets")
    flags.add_argument("--transport", choices=TRANSPORTS, default="ring", help="how keys and values travel")
    flags.add_argument("--scan", choices=tuple(ALGORITHMS), default="all_gather", help="how states travel")


def _add_plan(flags: Flags) -> None:
    flags.add_argument(
        "--plan",
        action="store_true",
        help="measure what groups of ranks cost, plan for every batch who shares which document, and compare with the "
        "best plan of one degree",
    )
    flags.add_argument(
        "--plan-seconds", type=_rate, default=0.5, metavar="S", help="how long planning a batch may take, meanwhile"
    )
    flags.add_argument(
        "--device-tokens", type=_whole(0), default=0, metavar="N", help="tokens that a rank may hold (0: what fits)"
    )
    flags.add_argument("--plan-out", default="", metavar="FILE", help="write the times of all plans there as JSON")


def _add_model(flags: Flags) -> None:
    flags.add_argument(
        "--pattern",
        default="",
        metavar="NAMES",
        help='layers from the catalog, such as "gla gla softmax" (seqpar layers)',
    )
    flags.add_argument("--repeats", type=_whole(1), default=1, metavar="N", help="of the pattern")
    flags.add_argument("--mixer", choices=tuple(MIXERS), default="linear_attention", help="what the linear layers do")
    flags.add_argument(
        "--feature-map", choices=tuple(FEATURE_MAPS), default="elu_plus_one", help="of linear_attention's q and k"
    )
    flags.add_argument(
        "--softmax-every", type=_whole(0), default=4, metavar="N", help="each N-th layer is softmax attention (0: none)"
    )
    flags.add_argument("--dim", type=_whole(1), default=128, help="width of the model")
    flags.add_argument("--layers", type=_whole(1), default=4, help="number of layers")
    flags.add_argument("--heads", type=_whole(1), default=4, help="heads per layer; must divide the width")
    flags.add_argument("--kv-heads", type=_whole(1), help="key/value heads of softmax layers (None: as many as heads)")
    flags.add_argument("--window", type=_whole(1), help="tokens that softmax layers see, itself included (None: all)")
    flags.add_argument("--checkpoint", action="store_true", help="compute layers again in backward, to save memory")
    flags.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="numbers the model computes with")


def _add_training(flags: Flags) -> None:
    flags.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, or directories with all files below them, read as bytes (none: Python's standard library)",
    )
    flags.add_argument("--tokens", type=_whole(2), default=16384, help="tokens (bytes) per sequence, at most")
    flags.add_argument(
        "--longest", type=_whole(2), metavar="N", help="leave out documents of more than N tokens (None: none)"
    )
    flags.add_argument("--steps", type=_whole(1), default=40, help="optimizer steps")
    flags.add_argument("--learning-rate", type=_rate, default=1e-3, metavar="RATE", help="of AdamW")
    flags.add_argument(
        "--warm-up", type=_whole(0), default=10, metavar="N", help="steps in which the rate rises to its value"
    )
    flags.add_argument("--seed", type=_whole(0), default=0, help="of the weights and of the order of the text")
    flags.add_argument("--threads", type=_whole(1), default=1, help="CPU threads per rank")
    flags.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs, one per rank, if there are any"
    )
    flags.add_argument(
        "--timeout", type=seconds, default=TIMEOUT, metavar="S", help="seconds that a rank waits for the others"
    )


def _add_report(flags: Flags) -> None:
    flags.add_argument("--every", type=_whole(1), default=1, metavar="N", help="print every N-th step")
    flags.add_argument("--logdir", default="runs/train", metavar="DIR", help="for TensorBoard ('': write nothing)")
    flags.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train again on one rank, uncut, and compare the losses",
    )
    flags.add_argument(
        "--tolerance",
        type=_rate,
        help="largest relative difference of the losses (None: 1e-4 in float32, 1e-9 in float64, 2e-2 in bfloat16)",
    )


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return number


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
