"""The laws of the house: what may be imported where, what is forbidden, and how big things may be.

Each law is a function that reads source files and yields what is wrong as ``file:line: why``.
"""

import ast
import statistics
from collections import Counter
from pathlib import Path

from tests.house import ABOVE, BELOW, ROWS, circles, dotted, graph

KEYWORD_PARAMETERS = {
    ("seqpar/training/wrap.py", "build"): "passes on the arguments of the class or factory that it decorates",
    ("seqpar/training/wrap.py", "forward"): "passes on what the user's model takes by name: nobody else knows it",
    ("seqpar/training/classes.py", "__init__"): "passes on the arguments of the class that it decorates",
    ("seqpar/training/classes.py", "__call__"): "passes on what a model of that class is called with",
    ("seqpar/hf/calls.py", "call"): "transformers' code passes what it has; what is not known and set is refused",
    ("seqpar/hf/trainer.py", "_get_dataloader"): "hands on what transformers' Trainer passes to itself",
    ("seqpar/hf/standing.py", "at"): "hands on what transformers' code passes",
    ("seqpar/hf/standing.py", "opened"): "hands on what transformers' code passes",
    ("seqpar/layers/parts/checks.py", "positive"): "names and sizes to check; nothing is passed on",
    ("seqpar/ops/precision.py", "run"): "the decorator hands over the arguments of the function it decorates",
    ("seqpar/ops/compiling.py", "run"): "the decorator hands over the arguments of the function it decorates",
    (
        "seqpar/training/wrap.py",
        "compile",
    ): "the arguments of torch.compile, as nn.Module.compile takes them",
    ("seqpar/ops/launch.py", "launch"): "constants, warps and stages are Triton's to know",
}
PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml")
OBJECT_COLLECTIVES = (
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
)  # fmt: skip
MPI_PICKLES = ("send", "isend", "recv", "irecv", "sendrecv", "bcast", "gather", "scatter", "allgather", "alltoall",
               "reduce", "allreduce")  # fmt: skip
CHANGES = ("append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear")


def within(name, module):
    return name == module or name.startswith(f"{module}.")


def of(name, allowed):
    return allowed is not None and (within(name, allowed) or within(allowed, name))


def is_in(source, *patterns):
    return any(Path(source.path).match(pattern) for pattern in patterns)


# The laws.


def torch_distributed_in_one_file(sources):
    for source in sources:
        if source.path == "collectives/c10d.py":
            continue
        allowed = "torch.distributed.checkpoint" if is_in(source, "seqpar/training/checkpoint*.py") else None
        found = [node for node, name in source.imports() if within(name, "torch.distributed") and not of(name, allowed)]
        found += [node for node in source.nodes(ast.Attribute) if dotted(node) == "torch.distributed"]
        yield from (source.at(node, "torch.distributed belongs in collectives/c10d.py") for node in found)


def environment_in_one_file(sources):
    for source in sources:
        if source.path == "collectives/launcher.py":
            continue
        names = ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv")
        found = [node for node in source.nodes(ast.Attribute) if dotted(node) in names]
        found += [node for node, name in source.imports() if name in names]
        yield from (source.at(node, "only collectives/launcher.py reads the environment") for node in found)


def triton_in_kernels(sources):
    for source in sources:
        if not is_in(source, "seqpar/ops/*/kernel*.py"):
            found = [node for node, name in source.imports() if within(name, "triton")]
            yield from (source.at(node, "triton is imported in seqpar/ops/*/kernel*.py only") for node in found)


def transformers_in_its_room(sources):
    for source in sources:
        if source.room != "hf":
            found = [node for node, name in source.imports() if within(name, "transformers")]
            yield from (source.at(node, "transformers is imported in seqpar/hf only") for node in found)


def planner_without_torch(sources):
    for source in sources:
        if source.package == "planner":
            found = [node for node, name in source.imports() if within(name, "torch")]
            yield from (source.at(node, "the planner imports no torch") for node in found)


def arrows(sources):
    """Rooms import what stands below them; the three rooms at the bottom know neither each other nor any other."""
    floors = {room: floor for floor, row in enumerate(ROWS) for room in row}
    for source in sources:
        for node, name in source.imports():
            top, *rest = name.split(".")
            if top in (*ABOVE, *BELOW):
                yield source.at(node, f"{source.package} must not import {top}; ours is seqpar.{top}")
            elif top == "seqpar" and rest and source.room and not may_import(source.room, rest[0], floors):
                yield source.at(node, f"{source.room} must not import seqpar.{rest[0]}")
            elif name == "seqpar" and source.room and isinstance(node, ast.Import):
                yield source.at(node, f"{source.room} must not import the face: name the room")


def may_import(room, other, floors):
    return room == other or (other in floors and floors[room] < floors[other] and room not in BELOW)


def every_room_is_in_the_design(sources):
    known = {room for row in ROWS for room in row}
    for source in sources:
        if source.room is not None and source.room not in known:
            yield f"{source.path}:1: there is no room {source.room}: {', '.join(sorted(known))}"


def no_circles(sources):
    arrows = graph(sources)
    for circle in circles(arrows):
        first = circle[0]
        node = next(node for other, node in arrows[first].items() if other in circle)
        yield first.at(node, f"a circle: {', '.join(source.path for source in circle)}")


def small_folders(sources, most=20):
    counts = Counter(source.path.rpartition("/")[0] for source in sources)
    for folder, count in counts.items():
        if count > most:
            yield f"{folder}:1: {count} files, at most {most}: give it rooms"


def nothing_that_runs_data(sources):
    for source in sources:
        for node, name in source.imports():
            if name.split(".")[0] in PICKLES:
                yield source.at(node, f"{name} is forbidden: data must not run as code")
        for node in source.nodes(ast.Call):
            name = dotted(node.func)
            if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
                yield source.at(node, f"{name}() is forbidden")
        for node in source.nodes(ast.Attribute, ast.Name, ast.alias):
            last = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", getattr(node, "name", ""))
            parent = dotted(node.value) if isinstance(node, ast.Attribute) else ""
            if last in OBJECT_COLLECTIVES:
                yield source.at(node, f"{last} sends pickles: send tensors")
            if parent == "torch" and last in ("load", "save"):
                yield source.at(node, f"torch.{last} is pickle: use plain bytes or JSON")
            if parent.split(".")[-1].startswith("COMM_") and last in MPI_PICKLES:
                yield source.at(node, f"{last} of mpi4py sends pickles: use {last.capitalize()}")


def keyword_parameters_are_named(sources):
    for source in sources:
        for node in source.nodes(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda):
            name = getattr(node, "name", "lambda")
            if node.args.kwarg is not None and (source.path, name) not in KEYWORD_PARAMETERS:
                yield source.at(node, f"{name}(**{node.args.kwarg.arg}) takes anything: name the parameters")


def no_global_state(sources):
    for source in sources:
        for node in source.nodes(ast.Global):
            yield source.at(node, f"global {', '.join(node.names)}: pass it as an argument")
        containers = {}
        for node in source.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if names and makes_container(getattr(node, "value", None)):
                containers.update(dict.fromkeys(names, node))
        for name, node in containers.items():
            if name.islower() and name != "__all__":
                yield source.at(node, f"{name} is a mutable global: name it as a constant, and keep it one")
        yield from changes(source, containers)


def makes_container(value):
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = ("list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict", "bytearray")
    return isinstance(value, displays) or (isinstance(value, ast.Call) and dotted(value.func).split(".")[-1] in makers)


def changes(source, containers):
    for node in source.nodes(ast.Subscript):
        if isinstance(node.ctx, ast.Store | ast.Del) and dotted(node.value) in containers:
            yield source.at(node, f"{dotted(node.value)} is a global, and is changed here")
    for node in source.nodes(ast.Call):
        base, _, method = dotted(node.func).rpartition(".")
        if base in containers and method in CHANGES:
            yield source.at(node, f"{base} is a global, and is changed here")


def small_files_and_classes(sources, file_lines=400, class_lines=150):
    for source in sources:
        if source.num_lines > file_lines:
            yield f"{source.path}:1: {source.num_lines} lines, at most {file_lines}: split it"
        for node in source.nodes(ast.ClassDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > class_lines:
                yield source.at(node, f"class {node.name} has {lines} lines, at most {class_lines}")


def function_lines(sources):
    """Of every function its lines without the docstring, and where it is."""
    for source in sources:
        for node in source.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                lines -= first.end_lineno - first.lineno + 1
            yield lines, source.at(node, f"{node.name} has {lines} lines")


def short_functions(sources, median=10, ninetieth=40, longest=60, longest_kernel=100):
    """What Triton compiles holds everything in registers, and takes its arguments one by one: it may be longer."""
    kernels = [source for source in sources if is_in(source, "seqpar/ops/*/kernel*.py")]
    long_kernels = [(number, where) for number, where in function_lines(kernels) if number > longest_kernel]
    yield from (f"{where}, at most {longest_kernel}" for _, where in long_kernels)
    found = sorted(function_lines([source for source in sources if source not in kernels]))
    if not found:
        return
    lines = [number for number, _ in found]
    if statistics.median(lines) > median:
        yield f"half of all functions have more than {median} lines: the median is {statistics.median(lines)}"
    if lines[int(0.9 * (len(lines) - 1))] > ninetieth:
        yield f"one function in ten has more than {ninetieth} lines: the longest are " + "; ".join(
            where for _, where in found[-5:]
        )
    yield from (f"{where}, at most {longest}" for number, where in found if number > longest)


def enough_tests(sources, tests, ratio=0.8):
    code, tested = (sum(source.num_lines for source in each) for each in (sources, tests))
    if tested < ratio * code:
        yield f"tests/: {tested} lines of tests for {code} lines of code, at least {ratio} of them are wanted"


def every_op_has_its_meaning_and_its_test(sources, tests):
    paths = {source.path for source in sources}
    texts = {source.path: source.text for source in tests}
    for op in sorted({path.split("/")[2] for path in paths if is_in_op(path)}):
        test = f"tests/ops/test_{op}.py"
        if f"seqpar/ops/{op}/reference.py" not in paths:
            yield f"seqpar/ops/{op}:1: has no reference.py, the meaning of the op"
        if test not in texts:
            yield f"{test}:1: is missing"
        elif not any(word in texts[test] for word in ("backward", "gradient", "autograd.grad")):
            yield f"{test}:1: tests forward only, there is no word of backward or gradients"


def is_in_op(path):
    return path.startswith("seqpar/ops/") and path.count("/") == 3


LAWS = (
    torch_distributed_in_one_file,
    environment_in_one_file,
    triton_in_kernels,
    transformers_in_its_room,
    planner_without_torch,
    arrows,
    every_room_is_in_the_design,
    nothing_that_runs_data,
    keyword_parameters_are_named,
    no_global_state,
    small_files_and_classes,
    short_functions,
)
LAWS_OF_ALL = (no_circles, small_folders)
LAWS_OF_TESTS = (enough_tests, every_op_has_its_meaning_and_its_test)
