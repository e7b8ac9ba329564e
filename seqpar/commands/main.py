"""The ``seqpar`` command: one subcommand, whose file is read only when it is asked for.

Exit status: 0 when all is well, 1 when a difference was found or something does not fit, 2 for input that cannot be
used.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from seqpar.commands.arguments import Parser, did_you_mean
from seqpar.commands.streams import run_main

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "verify": "compare a cut model with itself on one device",
        "plan": "decide who shares which document of a batch",
        "calibrate": "measure what groups of ranks cost here, for plan",
        "memory": "plan what fills the devices and the host in a step",
        "layers": "list the layers there are, and what crosses a cut",
        "models": "list the models of transformers that train cut",
        "place": "give buffers addresses, and say how far from optimal that is",
        "doctor": "show what this machine has, and what for",
    }
)


def command() -> int:
    """The command as a process of its own; returns its exit status."""
    return run_main(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the process, if not given); returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(next((word for word in argv if not word.startswith("-")), None)).parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (ValueError, ImportError) as error:
        print(f"seqpar {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return status


def _parser(wanted: str | None) -> Parser:
    """The parser of all subcommands, with the arguments of the one that is ``wanted``."""
    parser = Parser(
        prog="seqpar",
        description="Train on very long sequences, cut over many GPUs, to the same numbers as one device.",
        epilog="Exit status: 0 all is well, 1 a difference was found, 2 input that cannot be used.",
    )
    parser.add_argument("--version", action="version", version=f"seqpar {importlib.metadata.version('seqpar')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        if name != wanted:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"seqpar.commands.{name}")
        module.add_arguments(commands.add_parser(name, help=summary, description=module.DESCRIPTION))
    if wanted is not None and wanted not in COMMANDS:
        _no_such_command(parser, wanted)
    return parser


def _no_such_command(parser: Parser, wanted: str) -> NoReturn:
    parser.error(f"there is no command {wanted!r}{did_you_mean(wanted, COMMANDS)}; there are {', '.join(COMMANDS)}")
