"""``seqpar plan``: what it prints, and one clear line with exit code 2 for what it cannot use."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seqpar.commands.main import main as seqpar
from seqpar.planner import Options, from_json, named_problem, plan_batch, read_costs
from seqpar.planner.check import check
from seqpar.planner.problem import texts
from seqpar.planner.problem.lengths import read_lengths
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
        ("400000000\n", "no number of these devices is enough"),
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
        ["--model", "gpt-7b-384k", "--cluster", "64xA"],
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
    assert len(lines) == 3
    assert "document 2 has 412,160 tokens: one device holds 6,407 tokens" in lines[1]
    assert lines[2].startswith("no plan: no number of these devices is enough")


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


def test_lengths_may_have_suffixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("4K, 64k\n100\n")
    assert main(["--lengths", str(path), *MODEL, "--json", "--seconds", "0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 4096 + 65_536 + 100


def test_names_in_short_are_planned(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lengths", lengths, "--model", "LLAMA-8", "--cluster", "3x4xh100", "--seconds", "0.1"]) == 0
    assert "llama-8b on 3x4xH100-80G" in capsys.readouterr().out


def test_a_slip_is_answered(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    for model, cluster, meant in (("llama-3-8b", "8xh100", "llama-8b"), ("llama-8b", "8xh100-90g", "H100-80G")):
        assert main(["--lengths", lengths, "--model", model, "--cluster", cluster]) == 2
        assert f", did you mean '{meant}'?" in capsys.readouterr().err


def test_the_number_of_devices_that_is_named_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.txt"
    path.write_text("256K\n")
    words = ["--lengths", str(path), "--model", "llama-8b", "--seconds", "0.1", "--cluster"]
    assert main([*words, "2xH100-80G"]) == 2
    assert capsys.readouterr().err.endswith("; the smallest that holds all is 6xH100-80G\n")
    assert main([*words, "5xH100-80G"]) == 2 and main([*words, "6xH100-80G"]) == 0


def test_files_without_end_are_read_to_the_limit_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_BYTES", 1000)
    taken = []

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            buffer[:] = b"5" * len(buffer)
            taken.append(len(buffer))
            assert sum(taken) <= 100_000
            return len(buffer)

    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedReader(Endless()))
    for read in (read_lengths, read_costs):
        taken.clear()
        with pytest.raises(ValueError, match="anything is larger than 0 MiB"):
            read("anything")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom"])
def test_devices_without_end_are_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(texts, "MOST_BYTES", 10_000)
    for read in (read_lengths, read_costs):
        with pytest.raises(ValueError, match=f"{device} is larger than"):
            read(device)


def test_words_of_100_000_characters_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.txt"
    path.write_text("x" * 100_000)
    assert main(["--lengths", str(path), *MODEL]) == 2
    assert main(["--lengths", "y" * 100_000, *MODEL]) == 2
    assert len(capsys.readouterr().err) < 1000


def test_nothing_idle_is_not_less_than_nothing() -> None:
    plan = plan_batch(named_problem((26_000,), "gpt-7b-384k", "8xA100-40G"), Options(seconds=0.1))
    (batch,) = plan.micro_batches
    short = replace(plan, micro_batches=(replace(batch, seconds=batch.seconds * (1 - 1e-12)),))
    assert "-0%" not in text(short) and " 0%" in text(short)


def test_brackets_in_names_and_notes_are_printed() -> None:
    plan = plan_batch(named_problem((26_000,), "gpt-7b-384k", "8xA100-40G"), Options(seconds=0.1))
    what = "pip install 'seqpar[planner]'"
    page = text(replace(plan, note=what, model="[bold]m", active_bound="[x]"))
    assert what in page and "[bold]m on" in page and "[x]" in page
