"""What this machine has, and what each missing thing would be needed for."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

FOUND, MISSING, UNFIT = "found", "missing", "unfit"


@dataclass(frozen=True)
class Item:
    """One thing that was looked for; ``state`` is ``"found"``, ``"missing"`` or ``"unfit"`` (there, but of no use)."""

    part: str
    name: str
    state: str
    found: str
    used_for: str


def examine() -> list[Item]:
    """Look for everything. Nothing that is missing, or cannot be read, is an error."""
    return [*_basics(), *_devices(), *_backends(), *_packages(), *_kernels(), *_memory()]


def _basics() -> Iterator[Item]:
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Item("basics", "python", FOUND, f"{platform.python_version()}, {platform.system()} {platform.machine()}", "")
    build = "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip} build"
    elif torch.version.cuda:
        build = f"CUDA {torch.version.cuda} build"
    yield Item("basics", "torch", FOUND, f"{torch.__version__}, {build}", "")
    yield Item("basics", "threads", FOUND, f"{torch.get_num_threads()} of torch, {cpus} CPUs for this process", "")
    yield _package("basics", "seqpar", "")


def _devices() -> Iterator[Item]:
    import torch

    count = torch.cuda.device_count()
    if not count:
        yield Item("devices", "GPU", MISSING, "", "training at speed; everything also runs on CPUs")
    for number in range(count):
        facts = torch.cuda.get_device_properties(number)
        found = f"{facts.name}, {_size(facts.total_memory)}"
        yield Item("devices", f"GPU {number}", FOUND, found, "")


def _backends() -> Iterator[Item]:
    from seqpar.collectives.c10d import available_backends

    uses = {
        "gloo": "ranks as processes on CPUs",
        "nccl": "ranks as processes on GPUs",
        "mpi": "nothing: mpirun starts ranks that talk over gloo or nccl",
    }
    for name, there in available_backends().items():
        yield Item("backends", name, FOUND if there else MISSING, "in torch" if there else "", uses.get(name, ""))
    yield _package("backends", "mpi4py", "mpirun, to agree where rank 0 listens; pip install 'seqpar[mpi]'")
    mpiexec = shutil.which("mpiexec") or shutil.which("mpiexec", path=os.path.dirname(sys.executable))
    used_for = "starting ranks with mpirun; torchrun and srun need none"
    yield Item("backends", "mpiexec", FOUND if mpiexec else MISSING, mpiexec or "", used_for)


def _packages() -> Iterator[Item]:
    yield _package("packages", "PuLP", "planner: exact plans by integer programming; without, the heuristic plans")
    yield _solvers()
    yield _package("packages", "rich", "tables and progress")
    yield _package("packages", "tensorboard", "curves of a training run; pip install 'seqpar[train]'")
    yield _apex()


def _kernels() -> Iterator[Item]:
    """Triton, and for each op whether its kernels run on the first GPU: some compilers get kernels wrong."""
    import torch

    from seqpar.ops.checks import CHECKS
    from seqpar.ops.choice import has_triton, triton_version, verdict

    used_for = "fused kernels on GPUs; without, the torch references run"
    version = triton_version() if has_triton() else ""
    yield Item("kernels", "triton", FOUND if version else MISSING, version, used_for)
    if not version or not torch.cuda.is_available():
        return
    x = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    for op, check in CHECKS.items():
        found = verdict(x, check)
        says = f"kernels run: {found.why}" if found.used else f"the reference runs: {found.why}"
        yield Item("kernels", op, FOUND if found.used else UNFIT, says, "" if found.used else "speed, on a GPU")


def _package(part: str, name: str, used_for: str) -> Item:
    version = _version(name)
    return Item(part, name, FOUND if version else MISSING, version, used_for)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _solvers() -> Item:
    packages = [f"{name} {_version(name)}" for name in ("highspy", "cbcbox", "scipy") if _version(name)]
    programs = [name for name in ("highs", "cbc", "glpsol", "scip", "gurobi_cl") if shutil.which(name)]
    found = ", ".join(packages + programs)
    return Item("packages", "solvers", FOUND if found else MISSING, found, "planner: what PuLP hands its problems to")


def _apex() -> Item:
    """NVIDIA apex is not in the public index, where an unrelated package has its name."""
    from seqpar.training.extras import find_apex

    used_for = "fused RMSNorm and AdamW on GPUs; without, torch's own"
    found = find_apex()
    if found is None:
        return Item("packages", "apex", MISSING, "", used_for)
    if found.why_not:
        return Item("packages", "apex", UNFIT, found.why_not, used_for)
    return Item("packages", "apex", FOUND, f"NVIDIA {found.version}, with {', '.join(found.extensions)}", used_for)


def _memory() -> Iterator[Item]:
    shared = _read(lambda: _size(shutil.disk_usage("/dev/shm").total))
    used_for = "nccl and data loaders of one host; a plain container's 64 MiB is too little"
    yield Item("memory", "shared memory", FOUND if shared else MISSING, shared, used_for)
    limit = _read(_cgroup_limit)
    yield Item("memory", "cgroup limit", FOUND if limit else MISSING, limit, "how much offload may put on the host")


def _read(look: Callable[[], str]) -> str:
    try:
        return look()
    except (OSError, ValueError):
        return ""


def _cgroup_limit() -> str:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            with open(path) as file:
                text = file.read().strip()
            return "no limit" if text == "max" or int(text) >= 1 << 60 else _size(int(text))
    return ""


def _size(bytes_: int) -> str:
    unit = next((u for u in (30, 20, 10) if bytes_ >= 1 << u), 0)
    return f"{bytes_ / (1 << unit):.4g} {({30: 'GiB', 20: 'MiB', 10: 'KiB', 0: 'bytes'})[unit]}"


def show(items: Iterable[Item]) -> None:
    """Print a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold", min_width=24)
    table.add_column("used for", overflow="fold")
    colours = {FOUND: "green", MISSING: "yellow", UNFIT: "red"}
    part = ""
    for item in items:
        if part and part != item.part:
            table.add_section()
        part = item.part
        table.add_row(item.name, Text(item.found or "missing", colours[item.state]), Text(item.used_for, "dim"))
    Console().print(table)
