"""`python -m bench.ops.linear_cpu`: decayed linear attention on CPU, beside the matmuls that it must do, on one thread.

First the time of the op (every kind of decay, fp32 and bf16, forward and forward with backward) over that of the bare
`torch.bmm` calls of the same shapes and dtype, on contiguous operands that are there already; then tokens/s from short
to long sequences, which should be one number. All rounds visit all cases, so a noisy minute touches every case alike.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table
from torch import Tensor

from seqpar.ops.decayed_linear_attention import reference as op

KINDS = ("none", "constant", "scalar", "vector")
DTYPES = (torch.float32, torch.bfloat16)
HEADS = 4
DIMS = (64, 128)
TOKENS = 8192
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 94208)
TARGET = 1.3
Step = Callable[[], object]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """What is timed: ``pass_`` is "forward" or "both"."""

    kind: str
    dtype: torch.dtype
    tokens: int
    dim: int
    pass_: str

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind:8} {dtype:8} {self.tokens:6} tokens, dim {self.dim:3}, {self.pass_}"


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Random q, k, v, the gradient of the output, and mild gates."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, case.tokens, HEADS, case.dim)
    q, k, v, d_o = (torch.randn(shape, generator=generator).to(case.dtype) for _ in range(4))
    gates = {"constant": (HEADS,), "scalar": shape[:3], "vector": shape}.get(case.kind)
    return q, k, v, d_o, None if gates is None else torch.rand(gates, generator=generator) * -0.02


def op_step(case: Case) -> tuple[Step, int]:
    """The op as one device runs it, and the tokens of its chunks."""
    q, k, v, d_o, log_decay = inputs(case)

    def forward() -> op.Run:
        run = op.begin(q, k, v, log_decay, ())
        op.finish(run, op.intra(run), None)
        return run

    def both() -> None:
        run = forward()
        adjoint = op.begin_backward(run, d_o, None)
        op.finish_backward(run, adjoint, op.intra_backward(run, adjoint), None)

    return (forward if case.pass_ == "forward" else both), op.begin(q, k, v, log_decay, ()).cut.chunk


def bare_step(case: Case, chunk: int, at_once: int) -> Step:
    """The matmuls of ``case`` and nothing else, ``at_once`` chunks in a call: 4 in forward, 9 more in backward."""
    count = case.tokens * HEADS // chunk
    tokens = torch.randn(count, chunk, case.dim).to(case.dtype)
    other, d_o = torch.randn_like(tokens), torch.randn_like(tokens)
    scores, states = torch.randn(count, chunk, chunk).to(case.dtype), torch.randn(count, case.dim, case.dim)
    states = states.to(case.dtype)
    new_tokens, new_scores, new_states = (torch.empty_like(x) for x in (tokens, scores, states))
    products = [
        (tokens, other.mT, new_scores), (scores, other, new_tokens),  # scores, and what they take of v
        (tokens.mT, other, new_states), (tokens, states, new_tokens),  # states, and what q takes of them
    ]  # fmt: skip
    if case.pass_ == "both":
        products += [
            (tokens, other.mT, new_scores), (d_o, other.mT, new_scores),  # scores again, and their gradient
            (scores, other, new_tokens), (scores.mT, tokens, new_tokens), (scores.mT, d_o, new_tokens),
            (tokens.mT, d_o, new_states), (d_o, states.mT, new_tokens),
            (other, states.mT, new_tokens), (tokens, states, new_tokens),
        ]  # fmt: skip
    calls = [
        (left[i : i + at_once], right[i : i + at_once], out[i : i + at_once])
        for left, right, out in products
        for i in range(0, count, at_once)
    ]

    def step() -> None:
        for left, right, out in calls:
            torch.bmm(left, right, out=out)

    return step


def seconds_of(step: Step, times: int = 1) -> float:
    """Seconds of the processor, not of the clock: on one thread the same, but for what other programs take."""
    start = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - start) / times


def run_rounds(steps: Sequence[Step], times: Sequence[int], rounds: int, say: Say) -> list[list[float]]:
    """The seconds of each step in each round, after a round to warm up; every round visits all steps."""
    for step in steps:
        step()
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for mine, step, count in zip(seconds, steps, times):
            mine.append(seconds_of(step, count))
    return seconds


def ratio(mine: list[float], base: list[float]) -> float:
    """The median, over the rounds of one run."""
    return median(x / y for x, y in zip(mine, base))


def measure_ratios(dtype: torch.dtype, dim: int, pass_: str, rounds: int, say: Say) -> list[dict[str, object]]:
    """All kinds of one shape, beside the bare matmuls of the same chunks and beside those of the cheapest chunks."""
    cases = [Case(kind, dtype, TOKENS, dim, pass_) for kind in KINDS]
    steps, chunks = zip(*(op_step(case) for case in cases))
    chunk = chunks[0]
    bare = [bare_step(cases[0], count, TOKENS * HEADS) for count in sorted({chunk, 64, 128})]
    names = sorted({chunk, 64, 128})
    seconds = run_rounds([*steps, *bare], [1] * (len(steps) + len(bare)), rounds, say)
    own = seconds[len(steps) + names.index(chunk)]
    cheapest = min(seconds[len(steps) :], key=median)
    return [
        {
            "kind": case.kind, "dtype": _name(dtype), "dim": dim, "pass": pass_, "chunk": chunk,
            "seconds": median(mine), "bare_seconds": median(own),
            "ratio": ratio(mine, own), "ratio_of_least": min(mine) / min(own),
            "ratio_to_cheapest_chunks": ratio(mine, cheapest),
        }
        for case, mine in zip(cases, seconds)
    ]  # fmt: skip


def measure_lengths(kind: str, dtype: torch.dtype, rounds: int, say: Say) -> list[dict[str, object]]:
    """Tokens/s of every length, forward and with backward; short ones run many times in a row."""
    found: list[dict[str, object]] = []
    for pass_ in ("forward", "both"):
        steps = [op_step(Case(kind, dtype, tokens, DIMS[0], pass_))[0] for tokens in LENGTHS]
        seconds = run_rounds(steps, [max(1, 16384 // tokens) for tokens in LENGTHS], rounds, say)
        rates = {tokens: tokens / median(mine) for tokens, mine in zip(LENGTHS, seconds)}
        flatness = max(rates.values()) / min(rates.values())
        found.append({"kind": kind, "dtype": _name(dtype), "pass": pass_, "flatness": flatness, "tokens_per_s": rates})
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ratio_table(rows: list[dict[str, object]]) -> Table:
    table = Table("dim", "dtype", "pass", "chunk", *KINDS, title=f"Time over that of the bare matmuls (aim: {TARGET})")
    for first in rows[:: len(KINDS)]:
        same = [row for row in rows if all(row[key] == first[key] for key in ("dim", "dtype", "pass"))]
        cells = [f"{row['ratio']:.2f}" for row in same]
        table.add_row(*(str(first[key]) for key in ("dim", "dtype", "pass", "chunk")), *cells)
    return table


def length_table(rows: list[dict[str, object]]) -> Table:
    columns = [f"{tokens // 1024}K" for tokens in LENGTHS]
    table = Table("decay", "dtype", "pass", *columns, "max/min", title="Thousand tokens/s, from short to long")
    for row in rows:
        rates = row["tokens_per_s"]
        assert isinstance(rates, dict)
        cells = [f"{rate / 1e3:.0f}" for rate in rates.values()]
        table.add_row(*(str(row[key]) for key in ("kind", "dtype", "pass")), *cells, f"{row['flatness']:.2f}")
    return table


def report(ratios: list[dict[str, object]], lengths: list[dict[str, object]], rounds: int) -> dict[str, object]:
    return {
        "what": "decayed linear attention on one CPU thread, in processor seconds; ratios are medians over rounds",
        "shape": f"batch 1, {HEADS} heads; ratios at {TOKENS} tokens, tokens/s at dim {DIMS[0]}",
        "bare": "torch.bmm alone, contiguous operands and results that are there already: 4 in forward, 9 in backward",
        "aim": TARGET,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python -m bench.ops.linear_cpu --rounds {rounds}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "ratios": ratios,
        "lengths": lengths,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()]
    model = f"{named.get('model name', platform.machine())}, family {named.get('cpu family', '?')}"
    return f"{model}, model {named.get('model', '?')}; {' '.join(flags)}"


def _saying(status: Status, name: str) -> Say:
    return lambda at: status.update(name + at)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops.linear_cpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="visits to every case (5)")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    ratios: list[dict[str, object]] = []
    lengths: list[dict[str, object]] = []
    with Console(stderr=True).status("") as status:
        for dim in DIMS:
            for dtype in DTYPES:
                for pass_ in ("forward", "both"):
                    say = _saying(status, f"dim {dim}, {_name(dtype)}, {pass_}: ")
                    ratios += measure_ratios(dtype, dim, pass_, options.rounds, say)
        for kind in ("constant", "scalar"):
            for dtype in DTYPES:
                say = _saying(status, f"lengths, {kind}, {_name(dtype)}: ")
                lengths += measure_lengths(kind, dtype, max(3, options.rounds // 2), say)
    console = Console()
    console = console if console.is_terminal else Console(width=130)
    console.print(ratio_table(ratios))
    console.print(length_table(lengths))
    if options.out is not None:
        options.out.write_text(json.dumps(report(ratios, lengths, options.rounds), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
