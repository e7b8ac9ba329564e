"""Gates that overflow, cancel or stop a state altogether give the numbers of the loop, forward and backward."""

import importlib
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.recurrence import decayed_linear_attention as oracle

FOLDER = "seqpar.ops.decayed_linear_attention"
KEYS, VALUES = 16, 5
STARTS = (12, 35)
SCALE = 0.5
WHICH = ("strong", "cliff", "dead", "dead at starts", "zero", "mild")
CONSTANT = ("strong", "dead", "zero", "mild")  # those that are the same for all tokens
CASES = [
    ("none", "zero"),
    *(("constant", which) for which in CONSTANT),
    *((kind, which) for kind in ("scalar", "vector") for which in WHICH),
]
Case = dict[str, Tensor | None]


def implementation(path: str) -> Any:
    """The six staged functions of the reference, or of the kernels where they can be had."""
    if path == "stages":
        pytest.importorskip("triton")
    return importlib.import_module(f"{FOLDER}.{path}")


def gates_of(kind: str, which: str, tokens: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "constant":
        return torch.tensor([{"strong": -20.0, "dead": -math.inf, "zero": 0.0, "mild": -1e-6}[which]])
    gates = torch.full((1, tokens, 1, KEYS)[: 3 if kind == "scalar" else 4], -1e-4)
    if which in ("strong", "zero", "mild"):
        gates.fill_({"strong": -20.0, "zero": 0.0, "mild": -1e-6}[which])
    elif which == "cliff":
        gates[:, : tokens // 2] = -20.0
    else:
        gates[:, [tokens // 2] if which == "dead" else list(STARTS)] = -math.inf
    return gates


def make(kind: str, which: str, tokens: int) -> Case:
    """Inputs and upstream gradients in fp32."""
    shapes = {
        "q": (1, tokens, 1, KEYS), "k": (1, tokens, 1, KEYS), "v": (1, tokens, 1, VALUES),
        "d_o": (1, tokens, 1, VALUES), "incoming": (1, 1, KEYS, VALUES), "d_final": (1, 1, KEYS, VALUES),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(tokens)
    drawn: Case = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, "log_decay": gates_of(kind, which, tokens)}


def expected(case: Case, starts: tuple[int, ...]) -> dict[str, Tensor]:
    """From the loop in fp64."""
    wide = {name: None if x is None else x.double() for name, x in case.items()}
    leaves = {name: wide[name] for name in ("q", "k", "v", "incoming", "log_decay") if wide[name] is not None}
    for x in leaves.values():
        x.requires_grad_()
    tokens = wide["q"].shape[1]
    lengths = [stop - start for start, stop in pairwise((0, *starts, tokens))]
    o, final = oracle(
        wide["q"], wide["k"], wide["v"], wide["log_decay"],
        lengths=lengths, scale=SCALE, initial_state=wide["incoming"],
    )  # fmt: skip
    loss = (o * wide["d_o"]).sum() + (final * wide["d_final"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"o": o.detach(), "final state": final.detach(), **{f"d{name}": x for name, x in zip(leaves, grads)}}


def tiles_of(q: Tensor, v: Tensor, log_decay: Tensor | None) -> Any:
    """Tiles whose chunks hold several sub-blocks, in the interpreter too."""
    vector = log_decay is not None and log_decay.dim() == 4
    tiles = importlib.import_module(f"{FOLDER}.tiles").tiles_for(q, v, vector)
    return replace(tiles, chunk=max(tiles.chunk, 32))


@torch.no_grad()
def staged(op: Any, case: Case, starts: tuple[int, ...], device: str) -> dict[str, Tensor]:
    """From the six stages, with what comes in at both ends passed on by their laws."""
    on = {name: None if x is None else x.to(device) for name, x in case.items()}
    q, k, v, log_decay = on["q"], on["k"], on["v"], on["log_decay"]
    begin = op.begin if op.__name__.endswith("reference") else partial(op.begin, tiles=tiles_of(q, v, log_decay))
    run = begin(q, k, v, log_decay, starts, scale=SCALE)
    adjoint = op.begin_backward(run, on["d_o"], on["incoming"])
    o = op.finish(run, op.intra(run), on["incoming"])
    dq, dk, dv, d_log_decay = op.finish_backward(run, adjoint, op.intra_backward(run, adjoint), on["d_final"])
    kept = 0.0 if run.reset else 1.0 if run.log_decay_total is None else run.log_decay_total.exp()
    final, d_incoming = run.outgoing + kept * on["incoming"], adjoint.outgoing + kept * on["d_final"]
    results = {"o": o, "final state": final, "dq": dq, "dk": dk, "dv": dv, "dincoming": d_incoming}
    return results if d_log_decay is None else {**results, "dlog_decay": d_log_decay}


def size_of(name: str, case: Case, want: dict[str, Tensor], path: str) -> Tensor:
    """What an error is compared with.

    The gates' gradient is a sum of differences of terms like ``q * dq``. Where next to nothing passes a gate they
    cancel: the kernels leave out what cancels exactly, the reference's error is that of the terms.
    """
    size = want[name].norm()
    if name == "dlog_decay" and path == "reference":
        size = torch.maximum(size, (case["q"].double() * want["dq"]).norm())
    return size


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind, which", CASES, ids=str)
@pytest.mark.parametrize("path", ["reference", "stages"])
def test_extreme_gates_are_exact(path: str, kind: str, which: str) -> None:
    """Every result in fp32 is within 1e-5 of the loop in fp64, relative to its norm; nothing is NaN."""
    op = implementation(path)
    device = "cuda" if path == "stages" and torch.cuda.is_available() else "cpu"
    many = path == "reference" or device == "cuda"  # the interpreter is slow
    tokens = (1000 if which == "mild" else 150) if many else 40
    starts = STARTS if which == "dead at starts" else ()
    case = make(kind, which, tokens)
    want, got = expected(case, starts), staged(op, case, starts, device)
    assert want.keys() == got.keys()
    for name, y in want.items():
        error = (got[name].double().cpu() - y).norm()
        assert got[name].isfinite().all() and error <= 1e-5 * size_of(name, case, want, path), (name, float(error))
