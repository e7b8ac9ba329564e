"""What rank 0 says while it trains by plans: what groups cost, the first plan, the times of every step, and who won."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from options import Options
from report import CONSOLE, shown
from rich.console import Console, RenderableType

from seqpar.commands.calibrate_report import report as calibration_table
from seqpar.commands.written import write
from seqpar.estimates.calibrate import Calibration
from seqpar.planner import Plan
from seqpar.planner.show.report import WIDTH, render, shape

NAMES = {"planned": "planned", "static": "one degree for all batches", "best_static": "the best degree for each batch"}
Curves = Callable[[int, Mapping[str, float]], None]
"""Takes the number of a step, and values by the names of their curves."""
_SHAPE = 30


@dataclass(frozen=True)
class PlannedStep:
    """One step: the plans that it was run by, by name, the seconds that each took, and what rank 0 sent as planned."""

    number: int
    loss: float
    plans: Mapping[str, Plan]
    seconds: Mapping[str, float]
    bytes_: int


class PlannedReport:
    """Prints on rank 0, and is silent on the others."""

    def __init__(self, options: Options, curves: Curves, speaks: bool) -> None:
        self._options = options
        self._curves = curves
        self._speaks = speaks
        self._steps: list[PlannedStep] = []

    def measured(self, calibration: Calibration) -> None:
        """What groups cost."""
        if self._speaks:
            CONSOLE.print("\n[bold cyan]What groups of ranks cost here[/]\n")
            _wide(calibration_table(calibration))

    def step(self, step: PlannedStep) -> None:
        """One line; before the first, the whole plan and the heads of the columns."""
        self._steps.append(step)
        if not self._speaks:
            return
        self._curves(step.number, _scalars(step))
        if len(self._steps) == 1:
            CONSOLE.print("\n[bold cyan]The plan of the first step[/]\n")
            _wide(render(step.plans["planned"], bars=_width() >= WIDTH))
            heads = f"{'step':>5} {'loss':>8} {'documents':>10} {'tokens':>8} {'planned':>9} {'static':>9} {'best':>9}"
            CONSOLE.print(f"\n[bold]{heads}   planned | static | best static of the batch[/]")
        if shown(step.number, self._options):
            plan, times = step.plans["planned"], "".join(f"{step.seconds[name]:>8.3f} s" for name in NAMES)
            shapes = " | ".join(_short(step.plans[name]) for name in NAMES)
            CONSOLE.print(
                f"{step.number:>5} {step.loss:>8.4f} {plan.num_documents:>10,} {plan.num_tokens:>8,}{times}   "
                f"[dim]{shapes}[/]"
            )

    def close(self) -> None:
        """All steps together; the first one, in which connections are made, is left out."""
        if not self._speaks or not self._steps:
            return
        summary = self._summary()
        CONSOLE.print(f"\n[bold]{'':>34} measured   predicted   planned is[/]")
        for name, row in summary.items():
            faster = f"{row['measured_ratio']:.2f}x as fast (predicted {row['predicted_ratio']:.2f}x)"
            CONSOLE.print(
                f"{NAMES[name]:>34} {row['measured_seconds']:>7.3f} s   {row['predicted_seconds']:>7.3f} s   "
                f"{'' if name == 'planned' else faster}"
            )
        late = [step.plans["planned"].note for step in self._steps if step.plans["planned"].note]
        if late:
            CONSOLE.print(f"[yellow]{len(late)} plans have a note, the last one: {late[-1]}[/]")
        if self._options.plan_out:
            made_by = {"arguments": sys.argv[1:], "torch": torch.__version__, "python": platform.python_version(),
                       "cores": os.cpu_count(), "ranks": self._steps[0].plans["planned"].devices}  # fmt: skip
            text = json.dumps({**made_by, "plans": summary}, indent=2)
            write(self._options.plan_out, f"{text}\n")

    def _summary(self) -> dict[str, dict[str, float]]:
        """By name the mean step as measured and as predicted, and both relative to the planned one."""
        steps = self._steps[1:] or self._steps
        measured = {name: statistics.mean(step.seconds[name] for step in steps) for name in NAMES}
        predicted = {name: statistics.mean(step.plans[name].step_seconds for step in steps) for name in NAMES}
        return {
            name: {
                "measured_seconds": measured[name],
                "predicted_seconds": predicted[name],
                "measured_ratio": measured[name] / measured["planned"],
                "predicted_ratio": predicted[name] / predicted["planned"],
                "steps": len(steps),
            }
            for name in NAMES
        }


def _scalars(step: PlannedStep) -> dict[str, float]:
    """What TensorBoard draws: rates are those of the planned step, seconds are those of all plans."""
    scalars = {
        "loss": step.loss,
        "tokens per second": step.plans["planned"].num_tokens / step.seconds["planned"],
        "bytes sent": float(step.bytes_),
    }
    for name, plan in step.plans.items():
        scalars[f"seconds measured/{name}"] = step.seconds[name]
        scalars[f"seconds predicted/{name}"] = plan.step_seconds
    return scalars


def _width() -> int:
    """A pipe has no width of its own."""
    return CONSOLE.width if CONSOLE.is_terminal else WIDTH


def _wide(what: RenderableType) -> None:
    Console(width=_width()).print(what)


def _short(plan: Plan) -> str:
    text = shape(plan)
    return text if len(text) <= _SHAPE else f"{text[: _SHAPE - 3]}..."
