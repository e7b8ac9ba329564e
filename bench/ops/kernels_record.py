"""Which kernels an op would start on a GPU, with which arguments: nothing runs, and no GPU is needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from seqpar.ops import choice, launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: ``args`` and ``options`` as :func:`seqpar.ops.launch.launch` got them."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One binary to compile for one architecture, and what asked for it.

    ``bytes_`` are those of all tensors it is given, each once; ``starts`` is how often one call of the op starts it.
    """

    case: str
    architecture: str
    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any = field(repr=False)
    bytes_: int = 0
    starts: int = 1

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).lstrip("_")

    @property
    def key(self) -> str:
        """The same for launches that run the same binary."""
        binary = (self.kernel.fn.__module__, self.name, self.signature, sorted(self.constants.items(), key=str))
        return str((*binary, sorted(self.attributes.items(), key=str), self.options, self.architecture))


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Within, launches are noted down instead of run, and every tensor seems to be on ``architecture``."""
    found: list[Launch] = []

    def note(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        if all(size > 0 for size in grid):
            found.append(Launch(kernel, tuple(grid), args, options))

    before = launch.launch, launch.architecture, choice.kernels_are_interpreted
    launch.launch, launch.architecture = note, lambda x: architecture
    choice.kernels_are_interpreted = lambda: True  # so that kernels may be asked for on tensors that are on no GPU
    try:
        yield found
    finally:
        launch.launch, launch.architecture, choice.kernels_are_interpreted = before


def recorded(run: Callable[[], Any], architecture: str) -> list[Launch]:
    """What ``run`` starts."""
    with recording(architecture) as found:
        run()
    return found


def job(start: Launch, architecture: str, case: str = "") -> Job:
    """What Triton would compile for this launch on that architecture: types, constants, and hints of divisibility."""
    if launch.interpreted(start.kernel):
        raise ValueError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    backend = make_backend(TARGETS[architecture])
    kernel = start.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"debug": False, **start.options}
    bound, special, _ = bind(*start.args, **options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, special, {})
    bytes_ = sum({id(x): x.numel() * x.itemsize for x in start.args if isinstance(x, Tensor)}.values())
    return Job(case, architecture, kernel, start.grid, signature, constants, attributes, options, bytes_)


def jobs(case: str, run: Callable[[], Any], architecture: str) -> list[Job]:
    """The distinct binaries that ``run`` needs on ``architecture``."""
    found: dict[str, list[Job]] = {}
    for start in recorded(run, architecture):
        one = job(start, architecture, case)
        found.setdefault(one.key, []).append(one)
    return [Job(**{**vars(same[0]), "starts": len(same)}) for same in found.values()]
