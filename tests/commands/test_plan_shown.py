"""``seqpar plan``: what it prints, and one clear line with exit code 2 for what it cannot use."""

import io
import json
import sys
from pathlib import Path

import pytest

from seqpar.commands.main import main as seqpar
from seqpar.planner import Options, from_json, named_problem, plan_batch
from seqpar.planner.check import check
from seqpar.planner.show.plot import plot
from seqpar.planner.show.report import shape, text

MODEL = ["--model", "gpt-7b-384k", "--cluster", "64xA100-40G"]
LENGTHS = (48_000, 48_000, 100_000, 48_000, 48_000)


def main(arguments: list[str]) -> int:
    return seqpar(["plan", *arguments])


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    path = tmp_path / "lengths.txt"
    path.write_text("48000\n48000, 100000\n\n48000 48000\n")
    return str(path)


def test_the_table_shows_placement_bound_and_baselines(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lengths", lengths, *MODEL, "--compare"]) == 0
    page = capsys.readouterr().out
    for words in ("<32, 8x4>", "proven optimal", "3.859", "0-31", "56-63", "all-to-all", "5.009", "28.2", "6,407"):
        assert words in page
    assert max(len(line) for line in page.splitlines()) <= 128


def test_json_is_a_plan_that_passes_the_checker(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lengths", lengths, *MODEL, "--json"]) == 0
    out = capsys.readouterr().out
    plan = from_json(out)
    check(named_problem(LENGTHS, "gpt-7b-384k", "64xA100-40G"), plan)
    assert json.loads(out)["step_seconds"] == pytest.approx(3.8589, abs=5e-5)


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("100\n200\n"))
    assert main(["--lengths", "-", *MODEL, "--pad", "128", "--first", "1"]) == 0
    assert "1 document, 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ("12\n-5\n", "line 2: expected a whole number"),
        ("1.5\n", "line 1: expected a whole number"),
        ("0\n", "at least 1"),
        ("abc\n", "got 'abc'"),
        ("99999999999999999999\n", "whole number"),
        ("400000000\n", "needs 62,432 devices"),
    ],
)
def test_bad_lengths_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(content)
    assert main(["--lengths", str(path), *MODEL]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "gpt-9b", "--cluster", "64xA100-40G"],
        ["--model", "gpt-7b-384k", "--cluster", "64xA100"],
        ["--model", "gpt-7b-384k", "--cluster", "0xA100-40G"],
        ["--model", "gpt-7b-384k", "--cluster", "12xA100-40G"],
        ["--model", "gpt-7b-384k", "--cluster", "64xH100-80G"],
        ["--model", "gpt-30b-384k", "--cluster", "8xA100-40G"],
        ["--model", "gpt-7b-384k", "--cluster", "64xA100-40G", "--plot", "plan.pdf"],
        ["--model", "gpt-7b-384k", "--cluster", "64xA100-40G", "--lengths", "no/such/file"],
    ],
)
def test_bad_names_get_one_line(lengths: str, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["--lengths", lengths, *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--seconds", "x"], ["--seconds", "nan"], ["--first", "0"],
                                   ["--seed", "-1"], ["--pad", "1.5"], ["--unknown"]])  # fmt: skip
def test_bad_arguments_get_one_line(lengths: str, capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--lengths", lengths, *MODEL, *wrong])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_why_names_every_document_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.txt"
    path.write_text("500000\n100\n412160\n")
    assert main(["--lengths", str(path), *MODEL, "--why"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "document 2 has 412,160 tokens and needs 65 devices" in lines[1]


def test_the_table_is_readable_without_colours() -> None:
    plan = plan_batch(named_problem(tuple(range(100, 9000, 60)), "gpt-7b-384k", "64xA100-40G"), Options(seconds=0.3))
    folded, full = text(plan), text(plan, full=True)
    assert shape(plan).split("> <")[0].strip("<>") in folded
    assert len(full.splitlines()) > len(folded.splitlines())
    assert "…" not in folded


def test_pictures_are_drawn_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = plan_batch(named_problem(LENGTHS, "gpt-7b-384k", "64xA100-40G"), Options(seconds=0.3))
    first, second, image = tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"
    for path in (first, second, image):
        plot(plan, str(path))
    assert first.read_bytes() == second.read_bytes()
    assert b"lower bound" in first.read_bytes() or b"<svg" in first.read_bytes()
    assert image.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="cannot write"):
        plot(plan, str(tmp_path / "no" / "such.svg"))
