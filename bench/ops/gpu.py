"""Kernels on a GPU: `python -m bench.ops.gpu --out bench/results/gpu.json`; `make gpu` tests first.

Each op, forward and forward + backward, beside what else computes the same here, from the same inputs in the same run;
tokens per second of whole layers from 1K to 92K tokens; and what cutting costs, by ranks emulated one after the other.
`--smoke` runs everything once, tiny, on whatever device there is. Exit status: 2 without a CUDA device.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import readme
from bench.ops import roofline
from bench.ops.gpu_cases import OURS, SHAPES, SMOKE, Contest, Shape, contests, cut_pass, normal
from bench.ops.gpu_measure import Step, ceilings, machine, medians
from bench.readme import table
from seqpar import Cut
from seqpar.layers import GLA, LightningAttention, SoftmaxAttention
from seqpar.ops import problems
from seqpar.ops.choice import kernels_are_interpreted
from seqpar.ops.decayed_linear_attention import DecayedLinearAttention
from seqpar.ops.delta_rule import DeltaRule
from seqpar.ops.problems import Problem
from seqpar.ops.selfcheck import placed

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 94208)
RANKS = (1, 2, 4, 8)
DTYPE = torch.bfloat16
PARTS = ("ops", "layers", "cutting")
Say = Callable[[str], None]


def measure_ops(
    shapes: Sequence[Shape], device: torch.device, impl: str, rounds: int, card: roofline.Card, only: str, say: Say
) -> Iterator[dict[str, Any]]:
    """A row for each op whose name contains ``only``, each shape and contender."""
    for shape in shapes:
        for contest in contests(shape, device, DTYPE, impl):
            if only not in contest.op:
                continue
            steps = {f"{name}|{both}": step_of(contest, name, both) for name in contest.contenders for both in (0, 1)}
            found = medians(steps, device, rounds)
            for name in contest.contenders:
                yield row_of(contest, name, [found[f"{name}|{both}"] for both in (0, 1)], found, card)
            say(f"{contest.op} {tuple(shape)}: {found[f'{OURS}|1']}")
            if device.type == "cuda":
                torch.cuda.empty_cache()


def step_of(contest: Contest, name: str, both: int) -> Step:
    call = contest.contenders[name]

    def forward() -> None:
        with torch.no_grad():
            call(*contest.inputs)

    def forward_and_backward() -> None:
        out = call(*contest.inputs)
        torch.autograd.grad(out, contest.inputs, out.detach(), allow_unused=True)

    return forward_and_backward if both else forward


def row_of(
    contest: Contest, name: str, seconds: list[float | str], found: dict[str, float | str], card: roofline.Card
) -> dict[str, Any]:
    """Seconds, how they compare with ours (above 1: slower than ours), and the part of the ceiling that is reached."""
    row: dict[str, Any] = {"op": contest.op, "shape": list(contest.shape), "contender": name}
    for both, what in enumerate(("forward", "both")):
        mine, ours = seconds[both], found[f"{OURS}|{both}"]
        row[f"{what}_seconds"] = mine
        if isinstance(mine, float):
            row[f"{what}_over_ours"] = mine / ours if isinstance(ours, float) else None
            row[f"{what}_of_ceiling"] = contest.work.seconds(card, backward=bool(both)) / mine
    return row


def layers(dim: int, heads: int) -> dict[str, nn.Module]:
    """One layer of each kind, of the same width."""
    return {
        "Lightning Attention": LightningAttention(dim, heads),
        "GLA": GLA(dim, heads),
        "softmax attention": SoftmaxAttention(dim, heads),
    }


def measure_layers(
    lengths: Sequence[int], dim: int, heads: int, device: torch.device, rounds: int, say: Say
) -> Iterator[dict[str, Any]]:
    """Tokens per second of one layer, forward and backward, for one sequence of each length."""
    torch.manual_seed(0)
    for name, layer in layers(dim, heads).items():
        layer = layer.to(device, DTYPE)
        steps = {str(tokens): layer_step(layer, tokens, dim, device) for tokens in lengths}
        found = medians(steps, device, rounds)
        rates = {tokens: int(tokens) / s for tokens, s in found.items() if isinstance(s, float)}
        failed = {tokens: s for tokens, s in found.items() if isinstance(s, str)}
        flatness = max(rates.values()) / min(rates.values()) if rates else None
        say(f"{name}: {', '.join(f'{tokens}: {rate:.0f}' for tokens, rate in rates.items())} tokens/s")
        yield {
            "layer": name,
            "dim": dim,
            "heads": heads,
            "tokens_per_second": rates,
            "failed": failed,
            "flatness": flatness,
        }


def layer_step(layer: nn.Module, tokens: int, dim: int, device: torch.device) -> Step:
    cut = Cut.whole([tokens])

    def step() -> None:
        x = torch.ones(1, tokens, dim, device=device, dtype=DTYPE, requires_grad=True)
        out = layer(x, cut)
        torch.autograd.grad(out, [x, *layer.parameters()], out.detach())

    return step


def measure_cutting(
    shape: Shape, ranks: Sequence[int], device: torch.device, impl: str, rounds: int, say: Say
) -> Iterator[dict[str, Any]]:
    """Forward and backward of an op whose tokens are dealt to several ranks, one after the other on this device."""
    for name, problem in cuttable(shape):
        tokens, shared = (placed(x, device, DTYPE) for x in (problem.tokens, problem.shared))
        (d_out,) = normal(device, DTYPE, tuple(shape))
        op = problem.build(impl)
        steps = {str(count): pass_of(op, tokens, shared, d_out, count) for count in ranks}
        found = medians(steps, device, rounds)
        one = found[str(ranks[0])]
        over = {count: s / one for count, s in found.items() if isinstance(s, float) and isinstance(one, float)}
        say(f"{name} cut: {', '.join(f'{count} ranks {ratio:.3f}' for count, ratio in over.items())}")
        yield {"op": name, "shape": list(shape), "seconds": found, "over_uncut": over}


def pass_of(op: Any, tokens: Any, shared: Any, d_out: Tensor, ranks: int) -> Step:
    def step() -> None:
        with torch.no_grad():
            cut_pass(op, tokens, shared, d_out, ranks)

    return step


def cuttable(shape: Shape) -> Iterator[tuple[str, Problem]]:
    """The recurrences whose cutting is measured."""
    b, t, h, d = shape
    for problem in problems.decayed(DecayedLinearAttention, d, t, batch=b, heads=h):
        yield f"linear attention, {problem.name} decay", problem
    for problem in problems.delta(DeltaRule, d, t, batch=b, heads=h):
        if problem.name == "scalar":
            yield "delta rule, scalar gate", problem


def markdown(result: dict[str, Any]) -> str:
    """What ``bench/README.md`` shows."""
    facts, card = result["machine"], result["ceilings"]
    head = (
        f"Taken on {facts['taken']} on {facts['device']}, driver {facts['driver']}, torch {facts['torch']}, triton "
        f"{facts['triton']}; flash-linear-attention {facts['flash-linear-attention'] or 'not installed'}. Measured "
        f"ceilings: {card['bytes_per_second'] / 1e12:.2f} TB/s copied, {card['flops_per_second'] / 1e12:.0f} TFLOP/s. "
        f"bf16, medians of {result['rounds']} rounds. Of ceiling: the least time at those rates by the time taken."
    )
    ops = [
        (row["op"], "x".join(map(str, row["shape"])), row["contender"],
         *(shown(row[f"{what}_seconds"], row.get(f"{what}_of_ceiling")) for what in ("forward", "both")))
        for row in result["ops"]
    ]  # fmt: skip
    lengths = sorted({int(n) for row in result["layers"] for n in row["tokens_per_second"]})
    rates = [
        (row["layer"], *(f"{row['tokens_per_second'].get(str(n), 0):.0f}" for n in lengths)) for row in result["layers"]
    ]
    cuts = [(row["op"], *(f"{ratio:.3f}" for ratio in row["over_uncut"].values())) for row in result["cutting"]]
    return "\n\n".join([
        head,
        table(("op", "b x t x h x d", "by", "forward ms (of ceiling)", "forward + backward ms (of ceiling)"), ops),
        "Tokens per second of one layer, forward and backward, by tokens in the sequence:",
        table(("layer", *lengths), rates),
        "Time of forward and backward with the tokens dealt to so many ranks, over that of the uncut op:",
        table(("op", *result["ranks"]), cuts),
    ])  # fmt: skip


def shown(seconds: float | str, part: float | None) -> str:
    return f"{1e3 * seconds:.3f} ({100 * (part or 0):.0f} %)" if isinstance(seconds, float) else "failed"


def run(
    device: torch.device,
    *,
    smoke: bool,
    rounds: int,
    say: Say,
    parts: Sequence[str] = PARTS,
    only: str = "",
    impl: str = "triton",
) -> dict[str, Any]:
    """Everything, or the parts that are asked for."""
    shapes, lengths, ranks = (SMOKE, (16, 24), (1, 2)) if smoke else (SHAPES, LENGTHS, RANKS)
    dim, heads = (32, 2) if smoke else (2048, 16)
    cut_shape = shapes[0] if smoke else Shape(2, 16384, 16, 128)
    card = ceilings(device, small=smoke)
    say(f"ceilings: {card.bytes_per_second / 1e12:.3f} TB/s, {card.flops_per_second / 1e12:.1f} TFLOP/s")
    rows = {
        "ops": lambda: measure_ops(shapes, device, impl, rounds, card, only, say),
        "layers": lambda: measure_layers(lengths, dim, heads, device, rounds, say),
        "cutting": lambda: measure_cutting(cut_shape, ranks, device, impl, rounds, say),
    }
    return {
        "machine": machine(device),
        "rounds": rounds,
        "impl": impl,
        "ceilings": {"bytes_per_second": card.bytes_per_second, "flops_per_second": card.flops_per_second},
        "ranks": list(ranks),
        **{part: list(measure()) if part in parts else [] for part, measure in rows.items()},
    }


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The rows of both; raises ``ValueError`` unless they were taken on the same device and versions."""
    if earlier["machine"] != later["machine"]:
        raise ValueError(
            f"--add: the file is from {earlier['machine']}, this is {later['machine']}: write another file"
        )
    return later | {part: earlier[part] + later[part] for part in PARTS}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.ops.gpu", description=__doc__)
    result.add_argument("--smoke", action="store_true", help="everything once, tiny, without a GPU if there is none")
    result.add_argument("--rounds", type=int, default=20)
    result.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    result.add_argument("--only", default="", help="of the ops, only those whose name contains this")
    result.add_argument("--out", type=Path, help="write JSON here")
    result.add_argument("--add", action="store_true", help="add to the rows that --out has already")
    result.add_argument("--readme", type=Path, help="put the tables into this file")
    return result


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        print("bench.ops.gpu: there is no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rounds, parts = 1 if options.smoke else options.rounds, options.part or PARTS
    impl = "triton" if device.type == "cuda" or kernels_are_interpreted() else "reference"
    result = run(device, smoke=options.smoke, rounds=rounds, say=progress, parts=parts, only=options.only, impl=impl)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.add and options.out.exists():
            result = joined(json.loads(options.out.read_text()), result)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.readme:
        readme.put(options.readme, "gpu", markdown(result))
    print(markdown(result))
    return 0


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
