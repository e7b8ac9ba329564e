"""A user's own planner, offload and collectives do no harm; nothing is loaded twice; a wheel holds seqpar and no more.

All of it in a checkout, from a wheel, and from a wheel made of an unpacked source distribution.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.house import PACKAGES, read

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"build", "dist", "runs", "__pycache__"}

SCRIPT = """
import collectives, offload, planner
import torch
import seqpar, seqpar.offload, seqpar.planner
from seqpar.models import HybridConfig, HybridLM

def train(group):
    model = seqpar.sequence_parallel(HybridLM(HybridConfig(dim=16, layers=2, heads=2)), group=group)
    tokens = torch.arange(60)[None]
    loss = model(tokens, labels=tokens, lengths=[40, 20]).loss
    loss.backward()
    return loss.isfinite().item()

assert train(seqpar.connect())
assert (collectives.MINE, offload.MINE, planner.MINE) == ("collectives", "offload", "planner")
"""

NOT_TWICE = """
import importlib, os, pkgutil, sys
import seqpar
for found in pkgutil.walk_packages(seqpar.__path__, "seqpar."):
    if found.name.split(".")[-1] != "__main__" and not found.name.split(".")[-1].startswith("kernel"):
        importlib.import_module(found.name)
names = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and name != "__main__":
        names.setdefault(os.path.realpath(file), set()).add(name)
place = os.path.realpath(os.path.dirname(seqpar.__file__))
ours = {file: of for file, of in names.items() if any(name.split(".")[0] == "seqpar" for name in of)}
assert len(ours) > 150, len(ours)
assert all(len(of) == 1 for of in ours.values()), [of for of in ours.values() if len(of) > 1]
print(seqpar.__file__)
"""

TYPES = """
from seqpar import sequence_parallel
from seqpar.collectives import run_ranks
from seqpar.planner import Options

Options(seconds="one")
run_ranks("four", print)
reveal_type(sequence_parallel)
"""


@pytest.fixture
def project(tmp_path):
    """A project whose own modules have our folders' names."""
    folder = tmp_path / "project"
    for package in ("planner", "collectives"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(f"MINE = {package!r}\n")
    (folder / "offload.py").write_text("MINE = 'offload'\n")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "twice.py").write_text(NOT_TWICE)
    return folder


def run(words, folder, path):
    """Python in ``folder``, with seqpar from ``path``; what launched the tests is none of its business."""
    launchers = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_", "MASTER_", "TORCHELASTIC_", "PMI_", "MPI_", "OMPI_")
    told = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    told |= {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run([sys.executable, *words], cwd=folder, env=told, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


def check_beside_names_of_ones_own(project, path):
    for words in (
        ["script.py"],
        ["-m", "seqpar", "verify", "--ranks", "2", "--tokens", "20"],
        ["-m", "seqpar", "doctor"],
    ):
        status, _, err = run(words, project, path)
        assert status == 0, err
    status, out, err = run(["twice.py"], project, path)
    assert status == 0, err
    assert out.strip() == str(Path(path) / "seqpar" / "__init__.py")


@pytest.mark.nightly
def test_names_of_ones_own_do_no_harm_beside_a_checkout(project):
    check_beside_names_of_ones_own(project, ROOT)


@pytest.mark.parametrize("name", ["collectives", "planner", "offload"])
@pytest.mark.skipif(not (ROOT / "collectives").exists(), reason="a source distribution has them inside of seqpar only")
def test_from_the_root_of_a_clone_the_name_that_is_right_is_said(name):
    status, _, err = run(["-c", f"import {name}"], ROOT, ROOT)
    assert status == 1 and f"ImportError: import it as seqpar.{name}: under two names there would be two" in err


# What is built.


def build(what, tree, out):
    """The only file that setuptools makes of a tree: ``what`` is ``"wheel"`` or ``"sdist"``."""
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git would have in it: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("tree") / "seqpar"
    shown = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = shown.stdout.splitlines() if shown.returncode == 0 else files_below(ROOT)
    for name in names:
        source, target = ROOT / name, copy / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.readlink(source), target) if source.is_symlink() else target.write_bytes(source.read_bytes())
    return copy


def files_below(root):
    """Where there is no git: an unpacked source distribution."""
    files = (file.relative_to(root) for file in root.rglob("*") if file.is_file())
    return [str(file) for file in files if not LEFT_OUT & set(file.parts) and ".egg-info" not in str(file)]


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(tree, tmp_path_factory):
    """The source distribution, unpacked."""
    made = build("sdist", tree, tmp_path_factory.mktemp("sdist"))
    with tarfile.open(made) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(folder := tmp_path_factory.mktemp("unpacked"), filter="data")
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    ended = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def sources(root):
    """Every Python file that is imported below seqpar, links followed."""
    walked = os.walk(root / "seqpar", followlinks=True)
    return {str(Path(place, f).relative_to(root)) for place, _, files in walked for f in files if f.endswith(".py")}


@pytest.mark.slow
def test_a_wheel_holds_all_of_seqpar_and_nothing_else(wheel, tree):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"seqpar", "seqpar-0.1.0.dist-info"}
    held = {name for name in names if name.startswith("seqpar/")}
    assert held == sources(tree) | {"seqpar/py.typed", "seqpar/hf/converted.json", "seqpar/hf/measured.json"}
    assert {"seqpar/collectives/group.py", "seqpar/planner/exact/solver.py"} <= held


@pytest.mark.slow
def test_names_of_ones_own_do_no_harm_beside_an_installed_wheel(project, site):
    check_beside_names_of_ones_own(project, site)


@pytest.mark.slow
def test_a_source_distribution_is_whole_and_holds_every_file_once(unpacked, tree, wheel, tmp_path):
    assert sources(unpacked) == sources(tree)
    assert not [name for name in ("collectives", "planner", "offload") if (unpacked / name).exists()]
    for name in ("tests/house.py", "tests/conftest.py", "bench/data/README.md", "examples/train.py", "docs/house.svg",
                 "Makefile", "requirements.lock", ".ci/make_venv.py", "launch/torchrun.sh", "LICENSE"):  # fmt: skip
        assert (unpacked / name).is_file(), name
    again = zipfile.ZipFile(build("wheel", unpacked, tmp_path))
    first = zipfile.ZipFile(wheel)
    assert sorted(again.namelist()) == sorted(first.namelist())
    ours = [name for name in first.namelist() if name.startswith("seqpar/")]
    assert all(again.read(name) == first.read(name) for name in ours)


@pytest.mark.slow
def test_the_tests_of_a_source_distribution_run(unpacked):
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    for chosen in (["--collect-only", "tests/sharding"], ["tests/planner/test_alone.py"]):
        status, out, err = run([*words, *chosen], unpacked, unpacked)
        assert status == 0, out + err
    code = "from tests.house import PACKAGES, read; print(*(source.path for source in read(*PACKAGES)))"
    assert run(["-c", code], unpacked, unpacked)[1].split() == [source.path for source in read(*PACKAGES)]


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_types_are_seen(installed, site, project):
    """Of an installed package only because it says that it is typed."""
    pytest.importorskip("mypy")
    (project / "typed.py").write_text(TYPES)
    words = ["-m", "mypy", "--cache-dir", str(project / "cache"), "--follow-imports", "silent", "typed.py"]
    if installed:
        words[2:2] = ["--python-executable", str(environment_of(site, project))]
    told = {**os.environ, "MYPYPATH": "" if installed else str(ROOT)}
    ended = subprocess.run([sys.executable, *words], cwd=project, env=told, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert 'Argument "seconds" to "Options" has incompatible type "str"' in ended.stdout
    assert 'Argument 1 to "run_ranks" has incompatible type "str"' in ended.stdout
    assert "Overload(def " in ended.stdout and "(target: torch.nn" in ended.stdout and "Found 2 errors" in ended.stdout


def environment_of(site, project):
    """A Python that sees what this one sees, and seqpar installed in ``site``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(project / "venv")], check=True)
    (packages,) = (project / "venv" / "lib").glob("python*/site-packages")
    (packages / "more.pth").write_text(f"{site}\n{sysconfig.get_path('purelib')}\n")
    return project / "venv" / "bin" / "python"
