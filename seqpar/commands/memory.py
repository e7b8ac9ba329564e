"""``seqpar memory``: what fills the devices and the host in one training step, before there is a GPU to fill.

Exit status: 0 where the step fits, 1 where the chosen strategy cannot hold it, 2 for input that cannot be used.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from seqpar.commands.arguments import count, tokens
from seqpar.offload.placement.place_plot import format_of
from seqpar.offload.planning.decoders import DECODERS, GPUS, decoder, gpu

if TYPE_CHECKING:
    from seqpar.estimates.memory import DryRun
    from seqpar.offload.planning.plan import SwapPlan

DESCRIPTION = (
    "Plan the memory of one training step: what each device and the host hold at their peaks, which saved activations "
    "stay, leave for the host or are computed again, what that costs, and where a layer's buffers lie. Nothing is "
    "allocated and no GPU is needed; figures of GPUs are what training achieves on them."
)
SWAPS = ("auto", "memo", "recompute", "input", "none")
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``seqpar memory``; ``parser.set_defaults(run=run)`` is set as well."""
    models, gpus = ", ".join(each.name for each in DECODERS), ", ".join(each.name for each in GPUS)
    parser.add_argument("--model", required=True, metavar="NAME", help=f"one of {models}")
    parser.add_argument(
        "--tokens", required=True, type=tokens, metavar="N", help="length of the sequence, such as 65536, 64K or 1M"
    )
    parser.add_argument("--devices", type=count, default=8, metavar="N", help="that share the sequence (default: 8)")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"one of {gpus} (default: h100)")
    parser.add_argument("--host-memory", type=count, default=2048, metavar="GIB", help="of one host (default: 2048)")
    parser.add_argument("--per-host", type=count, default=8, metavar="N", help="devices of one host (default: 8)")
    swaps = "auto: by linear programme, memo: a uniform share, recompute, input: swap inputs only, none: keep all"
    parser.add_argument("--swap", choices=SWAPS, default="auto", help=f"{swaps} (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="draw where a layer's buffers lie over time: .svg or .png")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan and show; returns the exit status. Raises ``ValueError`` with one line for input that cannot be used."""
    shape, device = decoder(arguments.model), gpu(arguments.gpu)
    from seqpar.commands.memory_report import draw, render
    from seqpar.estimates.memory import dry_run

    if arguments.plot is not None:
        format_of(arguments.plot)
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
        draw(found, arguments.plot)
    if arguments.json:
        print(json.dumps(as_json(found), allow_nan=False))
    else:
        from rich.console import Console

        console = Console()
        (console if console.is_terminal else Console(width=112)).print(render(found))
    return 0 if found.chosen is not None else 1


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
