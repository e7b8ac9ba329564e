"""The packages keep the laws of the house (``tests/laws.py``), and each law is shown to be able to fail."""

import ast
import subprocess
import sys

import pytest

from tests.house import (
    ABOVE,
    PACKAGES,
    PICTURE,
    ROOT,
    ROWS,
    Source,
    between_rooms,
    circles,
    graph,
    picture,
    read,
)
from tests.laws import (
    KEYWORD_PARAMETERS,
    LAWS,
    LAWS_OF_ALL,
    LAWS_OF_TESTS,
    arrows,
    enough_tests,
    environment_in_one_file,
    every_op_has_its_meaning_and_its_test,
    every_room_is_in_the_design,
    keyword_parameters_are_named,
    no_circles,
    no_global_state,
    nothing_that_runs_data,
    planner_without_torch,
    short_functions,
    small_files_and_classes,
    small_folders,
    torch_distributed_in_one_file,
    transformers_in_its_room,
    triton_in_kernels,
)

# The house keeps them.


@pytest.fixture(scope="module")
def packages():
    return read(*PACKAGES)


@pytest.fixture(scope="module")
def tests():
    return read("tests")


def check(broken):
    broken = list(broken)
    assert not broken, "\n".join(["", *broken])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_packages_keep(law, packages):
    check(law(packages))


@pytest.mark.parametrize("law", LAWS_OF_ALL, ids=lambda law: law.__name__)
def test_the_house_keeps(law):
    check(law(read(*PACKAGES, *ABOVE)))


@pytest.mark.parametrize("law", LAWS_OF_TESTS, ids=lambda law: law.__name__)
def test_the_tests_keep(law, packages, tests):
    check(law(packages, tests))


def test_what_is_allowed_is_still_there(packages):
    found = {
        (source.path, node.name)
        for source in packages
        for node in source.nodes(ast.FunctionDef)
        if node.args.kwarg is not None
    }
    assert set(KEYWORD_PARAMETERS) <= found, "an exception that nobody needs"


def test_importing_all_of_the_face_imports_neither_triton_nor_a_solver_nor_what_draws():
    code = (
        "import sys, torch; before = set(sys.modules); import seqpar, seqpar.models, seqpar.commands.main; "
        "[getattr(seqpar, name) for name in seqpar.__all__]; "
        "heavy = ('triton', 'pulp', 'highspy', 'matplotlib', 'rich', 'multiprocessing.pool', 'transformers'); "
        "print([module for module in heavy if module in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_picture_of_the_house_is_of_today(packages):
    """``python -m tests.house`` draws it."""
    assert PICTURE.read_text(encoding="utf-8") == picture(between_rooms(packages))


def test_the_picture_has_every_room_and_only_arrows_that_go_down(packages):
    floors = {room: floor for floor, row in enumerate(ROWS) for room in row}
    counts = between_rooms(packages)
    assert {source.room for source in packages if source.room} == {room for pair in counts for room in pair}
    assert all(floors[upper] < floors[lower] for upper, lower in counts)


def test_circles_are_found_whole_and_once():
    files = {"a": "import c", "b": "import a", "c": "from d import x\nimport b", "d": "", "e": "import d"}
    sources = [Source(f"{name}.py", text) for name, text in files.items()]
    assert [sorted(source.path for source in circle) for circle in circles(graph(sources))] == [
        ["a.py", "b.py", "c.py"]
    ]


# Each law can fail.

LONG = "def f(x):\n" + "    x += 1\n" * 70 + "    return x\n"

OFFENCES = [
    (torch_distributed_in_one_file, "seqpar/training/wrap.py", "import torch.distributed as dist", 1),
    (torch_distributed_in_one_file, "seqpar/training/wrap.py", "import torch\nfrom torch import distributed", 2),
    (torch_distributed_in_one_file, "collectives/ring.py", "from torch.distributed import all_reduce", 1),
    (torch_distributed_in_one_file, "offload/x.py", "import torch\n\nn = torch.distributed.get_rank()", 3),
    (torch_distributed_in_one_file, "offload/x.py", "importlib.import_module('torch.distributed')", 1),
    (environment_in_one_file, "seqpar/commands/main.py", "import os\nos.environ['X'] = '1'", 2),
    (environment_in_one_file, "planner/plan.py", "import os\n\nx = os.getenv('X')", 3),
    (environment_in_one_file, "planner/plan.py", "from os import environ", 1),
    (triton_in_kernels, "seqpar/ops/softmax_block/__init__.py", "def f():\n    import triton.language as tl", 2),
    (planner_without_torch, "planner/cost.py", "import numpy\nimport torch", 2),
    (arrows, "planner/plan.py", "import seqpar", 1),
    (arrows, "collectives/ring.py", "from seqpar.planner.plan import Plan", 1),
    (arrows, "offload/pool.py", "from collectives import Group", 1),
    (arrows, "offload/pool.py", "from seqpar.collectives import Group", 1),
    (arrows, "planner/plan.py", "from seqpar.sharding.shard import Shard", 1),
    (arrows, "seqpar/crossing/scan.py", "from seqpar.training.loss import next_token_loss", 1),
    (arrows, "seqpar/verification/a.py", "import seqpar.estimates.memory", 1),
    (arrows, "seqpar/ops/a/b.py", "def f():\n    from seqpar.layers import GLA", 2),
    (arrows, "seqpar/ops/a/b.py", "import seqpar", 1),
    (every_room_is_in_the_design, "seqpar/misc/a.py", "", 1),
    (transformers_in_its_room, "seqpar/layers/a.py", "from transformers import AutoModel", 1),
    (arrows, "seqpar/training/wrap.py", "x = 1\nfrom tests.oracles import softmax", 2),
    (nothing_that_runs_data, "seqpar/a.py", "import pickle", 1),
    (nothing_that_runs_data, "seqpar/a.py", "from yaml import load", 1),
    (nothing_that_runs_data, "seqpar/a.py", "x = eval('1')", 1),
    (nothing_that_runs_data, "seqpar/a.py", "exec('1')", 1),
    (nothing_that_runs_data, "seqpar/a.py", "import torch\ntorch.load('x')", 2),
    (nothing_that_runs_data, "collectives/c10d.py", "dist.broadcast_object_list([1])", 1),
    (nothing_that_runs_data, "collectives/c10d.py", "from torch.distributed import all_gather_object", 1),
    (nothing_that_runs_data, "collectives/launcher.py", "MPI.COMM_WORLD.bcast(1)", 1),
    (keyword_parameters_are_named, "seqpar/a.py", "def f(x, **kwargs):\n    pass", 1),
    (keyword_parameters_are_named, "seqpar/training/wrap.py", "class A:\n    def other(self, **options): ...", 2),
    (no_global_state, "seqpar/a.py", "cache = {}", 1),
    (no_global_state, "seqpar/a.py", "seen: set[int] = set()", 1),
    (no_global_state, "seqpar/a.py", "def f():\n    global count\n    count = 1", 2),
    (no_global_state, "seqpar/a.py", "TABLE = {}\ndef f(x):\n    TABLE[x] = 1", 3),
    (no_global_state, "seqpar/a.py", "TABLE = []\ndef f(x):\n    TABLE.append(x)", 3),
    (small_files_and_classes, "seqpar/a.py", "x = 1\n" * 401, 1),
    (small_files_and_classes, "seqpar/a.py", "\nclass A:\n" + "    x = 1\n" * 150, 2),
    (short_functions, "seqpar/a.py", "\n" + LONG + "def g(): ...\n" * 20, 2),
]


@pytest.mark.parametrize(("law", "path", "text", "line"), OFFENCES)
def test_an_offence_is_found_with_file_and_line(law, path, text, line):
    broken = list(law([Source(path, text)]))
    assert broken and all(message.startswith(f"{path}:{line}: ") for message in broken)


FAIR = [
    (torch_distributed_in_one_file, "collectives/c10d.py", "import torch.distributed as dist\nimport torch"),
    (environment_in_one_file, "collectives/launcher.py", "import os\nos.environ"),
    (environment_in_one_file, "seqpar/a.py", "import os\nos.path.join('a')"),
    (triton_in_kernels, "seqpar/ops/softmax_block/kernel.py", "import triton"),
    (planner_without_torch, "offload/a.py", "import torch"),
    (arrows, "seqpar/training/a.py", "import seqpar.planner, seqpar.offload.trace, seqpar.sharding.shard"),
    (arrows, "seqpar/__init__.py", "from seqpar.training.wrap import sequence_parallel"),
    (torch_distributed_in_one_file, "seqpar/training/checkpoint.py", "import torch.distributed.checkpoint as dcp"),
    (transformers_in_its_room, "seqpar/hf/a.py", "import transformers"),
    (nothing_that_runs_data, "seqpar/a.py", "model.eval()\nre.compile('x')\nmodel.load()\nMPI.COMM_WORLD.Bcast(x)"),
    (keyword_parameters_are_named, "seqpar/training/wrap.py", "def build(*args, **kwargs): ..."),
    (no_global_state, "seqpar/a.py", "TABLE = {1: 2}\n\ndef f():\n    seen = []\n    seen.append(TABLE[1])"),
    (small_files_and_classes, "seqpar/a.py", "x = 1\n" * 400),
    (short_functions, "seqpar/ops/a/kernel.py", LONG),
    (short_functions, "seqpar/a.py", 'def f():\n    """' + "words\n" * 100 + '    """\n    return 1'),
]


@pytest.mark.parametrize(("law", "path", "text"), FAIR)
def test_what_is_fair_passes(law, path, text):
    assert list(law([Source(path, text)])) == []


def test_long_functions_are_found_by_median_and_by_the_longest_tenth():
    medium = "def f(x):\n" + "    x += 1\n" * 10 + "    return x\n"
    assert "median is 12" in next(short_functions([Source("seqpar/a.py", medium)]))
    long = "def g(x):\n" + "    x += 1\n" * 45
    mixed = Source("seqpar/a.py", "def f(): ...\n" * 8 + long * 2)
    assert any("one function in ten" in why and "seqpar/a.py:55" in why for why in short_functions([mixed]))


def test_folders_with_too_many_files_are_found():
    full = [Source(f"seqpar/ops/a{number}.py", "") for number in range(21)]
    assert "seqpar/ops:1: 21 files" in next(small_folders(full))
    assert not list(small_folders(full[:20]))


def test_circles_are_found_with_file_and_line():
    pair = [
        Source("offload/a.py", "x = 1\nfrom seqpar.offload import b"),
        Source("offload/b.py", "import seqpar.offload.a"),
    ]
    (broken,) = no_circles(pair)
    assert broken.split(":")[0] in ("offload/a.py", "offload/b.py") and "offload/a.py, " in f"{broken}, "


def test_too_few_tests_are_found():
    code, few = [Source("seqpar/a.py", "x = 1\n" * 10)], [Source("tests/test_a.py", "x = 1\n" * 7)]
    assert "7 lines of tests for 10" in next(enough_tests(code, few))
    assert not list(enough_tests(code, [Source("tests/test_a.py", "x = 1\n" * 8)]))


def test_ops_without_reference_or_test_are_found():
    op = [Source("seqpar/ops/roll/__init__.py", "")]
    law = every_op_has_its_meaning_and_its_test
    assert [why.split(":")[0] for why in law(op, [])] == ["seqpar/ops/roll", "tests/ops/test_roll.py"]
    op.append(Source("seqpar/ops/roll/reference.py", ""))
    assert "forward only" in next(law(op, [Source("tests/ops/test_roll.py", "def test_forward(): ...")]))
    assert not list(law(op, [Source("tests/ops/test_roll.py", "def test_backward(): ...")]))
