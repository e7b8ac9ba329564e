"""Benches of the catalog's rows refuse what they cannot do before any work."""

import sys
from types import ModuleType

import pytest

from bench.models import layers, learning

BAD = [
    (layers, "--layers nothing"),
    (layers, "--resume"),
    (layers, "--tokens 0"),
    (layers, "--dim 10"),
    (layers, "--out nowhere/x.json"),
    (layers, "--plot x.gif"),
    (learning, "--layers nothing"),
    (learning, "--resume"),
    (learning, "--steps 0"),
    (learning, "--plot nowhere/x.svg"),
]


@pytest.mark.parametrize(("bench", "arguments"), BAD)
def test_bad_input_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bench: ModuleType, arguments: str
) -> None:
    monkeypatch.setattr(sys, "argv", [bench.__name__, *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"python -m {bench.__name__}: ")
