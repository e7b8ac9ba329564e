"""``seqpar memory``: what fills the devices and the host in one training step, before there is a GPU to fill.

Exit status: 0 where the step fits, 1 where the chosen strategy cannot hold it, 2 for input that cannot be used.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from seqpar.commands.arguments import count, tokens
from seqpar.commands.choices import DECODERS, GPUS, PASSING_ON
from seqpar.commands.written import try_to_write, write

if TYPE_CHECKING:
    from seqpar.estimates.memory import DryRun
    from seqpar.offload.planning.decoders import Decoder
    from seqpar.offload.planning.plan import SwapPlan

DESCRIPTION = (
    "Plan the memory of one training step: what each device and the host hold at their peaks, which saved activations "
    "stay, leave for the host or are computed again, what that costs, and where a layer's buffers lie. Nothing is "
    "allocated and no GPU is needed; figures of GPUs are what training achieves on them."
)
SWAPS = ("auto", "memo", "recompute", "input", "none")
_GIB = 2**30
_MOST_TOKENS = 2**26  # of a device: a layer of the smallest model saves a hundred times its memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar memory``; ``parser.set_defaults(run=run)`` is set as well."""
    parser.add_argument("--model", required=True, metavar="NAME", help=f"one of {', '.join(DECODERS)}")
    parser.add_argument(
        "--tokens", required=True, type=tokens, metavar="N", help="length of the sequence, such as 65536, 64K or 1M"
    )
    parser.add_argument("--devices", type=count, default=8, metavar="N", help="that share the sequence (default: 8)")
    gpus = f"one of {', '.join(GPUS)}, or a beginning (default: H100-80G)"
    parser.add_argument("--gpu", default="H100-80G", metavar="NAME", help=gpus)
    parser.add_argument("--host-memory", type=count, default=2048, metavar="GIB", help="of one host (default: 2048)")
    parser.add_argument("--per-host", type=count, default=8, metavar="N", help="devices of one host (default: 8)")
    swaps = "auto: by linear programme, memo: a uniform share, recompute, input: swap inputs only, none: keep all"
    parser.add_argument("--swap", choices=SWAPS, default="auto", help=f"{swaps} (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="draw where a layer's buffers lie over time: .svg or .png")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan and show; returns the exit status. Raises ``ValueError`` with one line for input that cannot be used."""
    from seqpar.offload.planning.decoders import gpu
    from seqpar.offload.planning.linear_program import INSTALL, solver_name

    if arguments.tokens > arguments.devices * _MOST_TOKENS:
        raise ValueError(f"--tokens {arguments.tokens:,} over {arguments.devices:,} devices: expected at most "
                         f"{_MOST_TOKENS:,} a device")  # fmt: skip
    shape, device = _shape(arguments.model), gpu(arguments.gpu)
    if arguments.swap == "auto" and solver_name() is None:
        raise ValueError(f"--swap auto, the default, needs PuLP and highspy: {INSTALL}; or choose --swap memo, "
                         "recompute, input or none")  # fmt: skip
    from seqpar.commands.memory_report import draw, render
    from seqpar.estimates.memory import dry_run
    from seqpar.offload.placement.place_plot import format_of

    if arguments.plot is not None:
        format_of(arguments.plot)
        try_to_write(arguments.plot)
    found = dry_run(
        shape,
        device,
        arguments.tokens,
        arguments.devices,
        strategy=arguments.swap,
        host_bytes=arguments.host_memory * float(_GIB),
        devices_per_host=arguments.per_host,
    )
    if arguments.plot is not None:
        write(arguments.plot, draw(found, format_of(arguments.plot)))
    if arguments.json:
        print(json.dumps(as_json(found), allow_nan=False))
    else:
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=112)).print(render(found))
    return 0 if found.chosen is not None else 1


def _shape(name: str) -> "Decoder":
    from seqpar.offload.planning.decoders import decoder

    if name.lower() in PASSING_ON:
        raise ValueError(f"{name} has layers that pass a state on, which seqpar plan prices; memory is planned for "
                         f"{', '.join(DECODERS)}")  # fmt: skip
    return decoder(name)


def as_json(found: "DryRun") -> dict[str, Any]:
    """The dry run as JSON: the chosen strategy's figures, and under ``strategies`` those of each."""
    strategies = {
        each.strategy: {"refused": each.refused} if each.plan is None else _plan(each.plan) for each in found.compared
    }
    return {
        "model": found.decoder.name,
        "gpu": found.gpu.name,
        "tokens": found.tokens,
        "devices": found.devices,
        "strategy": None if found.chosen is None else found.chosen.strategy,
        **({} if found.chosen is None else {**_plan(found.chosen), "mfu": found.mfu}),
        "limit": found.limit,
        "categories": dict(found.categories),
        "skeletal_bytes_per_layer": found.skeletal_bytes,
        "skeletal_bytes": found.skeletal_bytes * found.decoder.layers,
        "strategies": strategies,
    }


def _plan(plan: "SwapPlan") -> dict[str, Any]:
    return {
        "device_peak_bytes": plan.device_peak_bytes,
        "host_peak_bytes": plan.host_peak_bytes,
        "saved_bytes_per_layer": plan.saved_bytes_per_layer,
        "fractions": {
            name: {"keep": shares.keep, "swap": shares.swap, "recompute": shares.recompute}
            for name, shares in plan.fractions
        },
        "recompute_seconds": plan.recompute_seconds,
        "exposed_seconds": plan.exposed_seconds,
        "step_seconds": plan.step_seconds,
        "hides_from_tokens": plan.hides_from_tokens,
    }
