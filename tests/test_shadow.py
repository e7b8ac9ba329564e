"""A user's own module of the name of one of our packages is refused by name, not by a strange error later."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import seqpar
from seqpar.shadow import NEIGHBOURS, refuse_shadows

HOME = Path(seqpar.__file__).parent.parent


def run(code, folder):
    """Run code with ``folder`` first in ``sys.path``, as the folder of a script is, and ours second."""
    code = f"import sys; sys.path[:1] = [{str(folder)!r}, {str(HOME)!r}]; {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=100)


def lies_in(folder, form, name):
    if form == "file":
        (folder / f"{name}.py").write_text("raise SystemExit('this must not run')\n")
        return folder / f"{name}.py"
    (folder / name).mkdir()
    if form == "package":
        (folder / name / "__init__.py").write_text("raise SystemExit('this must not run')\n")
        return folder / name / "__init__.py"
    (folder / name / "notes.py").touch()
    return folder / name


@pytest.mark.parametrize(("name", "form"), [("planner", "file"), ("collectives", "file"), ("offload", "package")])
def test_a_module_that_hides_ours_is_named_with_both_files(tmp_path, name, form):
    theirs = lies_in(tmp_path, form, name)
    result = run("import seqpar", tmp_path)
    assert result.returncode == 1
    assert f"ImportError: seqpar needs its own package '{name}'" in result.stderr
    assert f"theirs: {theirs}" in result.stderr
    assert f"ours:   {HOME / name / '__init__.py'}" in result.stderr
    assert f"Rename theirs, or let {HOME} come before {tmp_path} in sys.path" in result.stderr


def test_one_that_is_imported_already_is_seen_too(tmp_path):
    (tmp_path / "planner.py").write_text("mine = 1\n")
    result = run(f"import planner; sys.path.remove({str(tmp_path)!r}); import seqpar", tmp_path)
    assert result.returncode == 1 and f"theirs: {tmp_path / 'planner.py'}" in result.stderr


def test_a_folder_without_init_hides_nothing_that_is_on_the_path(tmp_path):
    lies_in(tmp_path, "folder", "planner")
    result = run("import seqpar, planner; print(planner.__file__)", tmp_path)
    assert result.stdout.strip() == str(HOME / "planner" / "__init__.py"), result.stderr


def test_nothing_of_ours_is_imported_to_find_out():
    code = (
        "import importlib.util; spec = importlib.util.spec_from_file_location('shadow', 'seqpar/shadow.py'); "
        "shadow = importlib.util.module_from_spec(spec); spec.loader.exec_module(shadow); "
        "shadow.refuse_shadows('seqpar/__init__.py'); "
        "print(sorted({'seqpar', 'planner', 'offload', 'collectives', 'torch'} & set(sys.modules)))"
    )
    result = run(code, HOME)
    assert result.stdout.strip() == "[]", result.stderr


def install(folder):
    for name in ("seqpar", *NEIGHBOURS):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    return str(folder / "seqpar" / "__init__.py")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An installation in a folder of its own, none of it imported."""
    for name in NEIGHBOURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    file = install(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    return file


def test_a_plain_installation_passes(fresh):
    refuse_shadows(fresh)


def test_an_installation_through_links_passes(fresh, monkeypatch, tmp_path):
    os.symlink(tmp_path / "site", tmp_path / "link")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "link"), *sys.path[1:]])
    refuse_shadows(fresh)


def test_an_editable_installation_passes(fresh, monkeypatch, tmp_path):
    """setuptools' editable finder comes last: a folder without __init__.py in the path is found before it."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            from importlib.util import spec_from_file_location

            file = tmp_path / "site" / name / "__init__.py"
            return spec_from_file_location(name, file) if name in NEIGHBOURS else None

    monkeypatch.setattr(sys, "path", [entry for entry in sys.path[1:] if entry and Path(entry).resolve() != HOME])
    monkeypatch.setattr(
        sys, "meta_path", [*(f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")), Finder]
    )
    refuse_shadows(fresh)
    theirs = tmp_path / "work"
    (theirs / "offload").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(theirs), *sys.path])
    with pytest.raises(ImportError, match="another of that name") as caught:
        refuse_shadows(fresh)
    assert f"theirs: {theirs / 'offload'}\n" in str(caught.value)
    assert f"before {theirs} in" in str(caught.value)


def test_a_package_that_is_not_there_is_said(fresh, monkeypatch, tmp_path):
    (tmp_path / "site" / "planner" / "__init__.py").unlink()
    (tmp_path / "site" / "planner").rmdir()
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")])
    monkeypatch.setattr(sys, "path", sys.path[:1])
    with pytest.raises(ImportError, match="install seqpar again"):
        refuse_shadows(fresh)


def test_a_module_without_a_file_is_refused(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "offload", ModuleType("offload"))
    with pytest.raises(ImportError, match="made without a file"):
        refuse_shadows(fresh)


def test_when_all_is_well_it_costs_less_than_a_millisecond():
    def once():
        start = time.perf_counter()
        refuse_shadows(seqpar.__file__)
        return time.perf_counter() - start

    assert min(once() for _ in range(20)) < 1e-3
