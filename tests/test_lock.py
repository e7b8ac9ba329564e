"""The lock is whole and says nothing of where it was made; make_venv takes a torch that is here only if it fits."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def make_venv():
    spec = importlib.util.spec_from_file_location("make_venv", ROOT / ".ci" / "make_venv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_has_its_version_and_hashes(make_venv):
    blocks = make_venv.blocks(LOCK)
    assert "\n".join(blocks.values()) == "\n".join(line for line in LOCK.splitlines() if not line.startswith("#"))
    for name, block in blocks.items():
        assert re.match(rf"{name}==\d[\w.]*( ; [^\\]+)? \\\n(    --hash=sha256:[0-9a-f]{{64}}( \\\n)?)+$", block), block


def test_all_that_make_installs_is_there_but_torch_and_what_belongs_to_its_build(make_venv):
    names = set(make_venv.blocks(LOCK))
    wanted = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    wanted = {re.match(r"[\w-]+", line)[0].lower() for line in wanted} - {"torch"}
    assert wanted | {"pip", "setuptools", "sympy", "filelock"} <= names
    assert not [name for name in names if re.match("torch|nvidia|cuda", name)]


def test_no_address_and_no_place_is_in_the_lock():
    assert not re.search(r"://|--(extra-)?index|find-links|file:|/\w+/", LOCK)


@pytest.mark.parametrize(
    ("version", "virtual", "taken"),
    [
        ("2.11.0", False, True),
        ("2.13.0+cpu", False, True),
        ("3.0.0a0+git1f", False, True),
        ("2.10.1", False, False),
        ("2.9.0", False, False),
        ("2.13.0", True, False),
        (None, False, False),
    ],
)
def test_a_torch_that_is_here_is_taken_if_it_fits_and_can_be_seen(version, virtual, taken, make_venv, monkeypatch):
    monkeypatch.setattr(make_venv, "version", lambda name: version)
    monkeypatch.setattr(sys, "prefix", "/elsewhere" if virtual else sys.base_prefix)
    assert make_venv.torch_here() == (version if taken else None)
