"""Do an op's kernels give what its reference gives, on this device and with this compiler?

Law: for the inputs that a dtype holds, the kernels' output, states and gradients are those of the reference in fp64 on
the CPU, up to rounding. Some compilers get a kernel wrong without any error (see ``choice.py``): this takes seconds,
and tells.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from seqpar.ops.problems import Problem, random_tensors
from seqpar.ops.stages import Op, Tensors


def worst(found: Iterable[Problem], device: torch.device, dtype: torch.dtype) -> float:
    """The largest error over problems; NaN if any is."""
    errors = torch.tensor([max_error(problem, device, dtype) for problem in found], dtype=torch.float64)
    return float(errors.max())  # of a tensor: max() of floats may lose a NaN


def max_error(problem: Problem, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of all results of one problem."""
    pairs = zip(*both(problem, device, dtype), strict=True)
    return float(torch.tensor([relative_error(*pair) for pair in pairs], dtype=torch.float64).max())


def both(problem: Problem, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What the kernels give on ``device`` for inputs rounded to ``dtype``, and what the reference gives in fp64."""
    device_tokens, device_shared = (placed(x, device, dtype) for x in (problem.tokens, problem.shared))
    tokens, shared = (placed(x, torch.device("cpu"), torch.float64) for x in (device_tokens, device_shared))
    exact = problem.build("reference")
    d_out, *states = boundary(exact, tokens, shared, problem.starts, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = results(exact, tokens, shared, problem.starts, d_out, *states)
    found = results(
        problem.build("triton"), device_tokens, device_shared, problem.starts, d_out.to(device, dtype),
        *(state.to(device, wide) for state in states),
    )  # fmt: skip
    return found, expected


def results(
    op: Op, tokens: Tensors, shared: Tensors, starts: tuple[int, ...], d_out: Tensor, incoming: Tensor, d_final: Tensor
) -> list[Tensor | None]:
    """All that the stages of an op give: the output, both outgoing states, and the gradients of all inputs."""
    run = op.begin(tokens, shared, starts)
    leaving = run.outgoing.clone()
    out = op.finish(run, op.intra(run), incoming).clone()
    adjoint = op.begin_backward(run, d_out, incoming)
    d_leaving = adjoint.outgoing.clone()
    d_tokens, d_shared = op.finish_backward(run, adjoint, op.intra_backward(run, adjoint), d_final)
    return [out, leaving, d_leaving, *d_tokens, *d_shared]


def boundary(
    op: Op, tokens: Tensors, shared: Tensors, starts: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A random gradient of the output, incoming state and gradient of the final one, of values that all dtypes hold."""
    run = op.begin(tokens, shared, starts)
    out = op.finish(run, op.intra(run), None)
    d_out, incoming, d_final = random_tensors(1, out.shape, run.outgoing.shape, run.outgoing.shape)
    return d_out.to(dtype).double(), incoming.float().double(), d_final.float().double()


def placed(tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Tensors:
    """On ``device``: fp64 becomes ``dtype``, and fp32 stays unless ``dtype`` is wider."""
    wide = dtype == torch.float64

    def place(x: Tensor) -> Tensor:
        return x.to(device, dtype if wide or x.dtype == torch.float64 else x.dtype)

    return tuple(None if x is None else place(x) for x in tensors)


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference by norm of what is expected; NaN where anything is not a number."""
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    exact = expected.double().cpu()
    return float((found.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30))
