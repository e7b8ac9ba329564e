"""The command as people use it: what goes wrong gets one line and exit code 2, and nothing else is printed."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from seqpar.commands.main import main as seqpar
from seqpar.planner import Options, Plan, PlannedGroup, PlannedMicroBatch, check, from_json, named_problem, plan_batch
from seqpar.planner.problem.lengths import read_lengths
from seqpar.planner.show.plot import format_of, plot
from seqpar.planner.show.report import shape, text
from tests.planner.problems import lognormal, published, small_problem

MODEL = ["--model", "gpt-7b-384k", "--cluster", "64xA100-40G"]
ROOT = Path(__file__).resolve().parents[2]
Captured = pytest.CaptureFixture[str]


def main(arguments: list[str]) -> int:
    return seqpar(["plan", *arguments])


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    path = tmp_path / "lengths.txt"
    path.write_text("48000\n48000\n100000\n48000\n48000\n")
    return str(path)


def ended(arguments: list[str]) -> int:
    """The exit status, however the command ends."""
    try:
        return main(arguments)
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code


def refused(arguments: list[str], captured: Captured) -> str:
    """The one line with which these arguments are refused."""
    assert ended(arguments) == 2
    out, error = captured.readouterr()
    assert out == ""
    assert error.endswith("\n")
    assert len(error.splitlines()) == 1, error
    assert "Traceback" not in error
    return error


CONTENTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty: expected document lengths"),
    "blank lines": (b"\n \n\t\n", "is empty"),
    "commas alone": (b",,,\n", "is empty"),
    "negative": (
        b"5\n-5\n",
        "line 2: expected a whole number of tokens, at least 1, such as 65536, 64K or 1M, got '-5'",
    ),
    "zero": (b"5,6\n7,0\n", "line 2"),
    "a fraction": (b"5.0", "got '5.0'"),
    "an exponent": (b"1e3", "got '1e3'"),
    "text": (b"5 tokens\n", "got 'tokens'"),
    "a header": (b"length\n5\n", "line 1"),
    "infinite": (b"inf", "got 'inf'"),
    "not a number": (b"nan", "got 'nan'"),
    "underscores": (b"1_000", "got '1_000'"),
    "other digits": ("\u0665".encode(), "line 1"),
    "hexadecimal": (b"0x10", "got '0x10'"),
    "JSON": (b"[5, 6]", "got '[5'"),
    "huge": (b"9" * 16, "whole number"),
    "endless digits": (b"9" * 10_000, "got '9999"),
    "long words": (b"x" * 10_000, "got 'xxxx"),
    "binary": (bytes(range(128, 256)), "is not text"),
    "zero bytes": (b"\0\0\0", "line 1"),
    "half a character": (b"5\n\xe2\x82", "is not text"),
    "more than any group holds": (b"5\n999999999999999", "no number of these devices is enough"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_files_that_hold_no_lengths_get_one_line(tmp_path: Path, capsys: Captured, name: str) -> None:
    content, expected = CONTENTS[name]
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    line = refused(["--lengths", str(path), *MODEL], capsys)
    assert expected in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("name", "expected"), [("no/such/file", "No such file"), (".", "Is a directory"), ("", "cannot read"),
                           ("x" * 300, "File name too long"), ("a\0b", "null")]
)  # fmt: skip
def test_files_that_cannot_be_read_get_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, name: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(["--lengths", name, *MODEL], capsys)
    assert expected in line or (name == "" and "directory" in line)


WRONG = [
    *(["--seconds", value] for value in ("0", "-1", "nan", "inf", "1e99", "soon", "", "86400")),
    *(["--first", value] for value in ("0", "-1", "1.5", "many", "", "\u0665")),
    *(["--pad", value] for value in ("0", "-128", "x")),
    *(["--seed", value] for value in ("-1", "0.5", "x")),
    *(["--model", value] for value in ("", "gpt", "gpt-7b-385k", "../x")),
    *(["--cluster", value] for value in ("", "64", "x", "64x", "0xA100-40G", "-1xA100-40G", "65xA100-40G", "64xTPU")),
    *(["--plot", value] for value in ("plan", "plan.pdf", ".svg.gz", "")),
    ["--unknown"], ["extra"], ["--json", "1"],
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_arguments_that_make_no_sense_get_one_line(lengths: str, capsys: Captured, wrong: list[str]) -> None:
    refused(["--lengths", lengths, *MODEL, *wrong], capsys)


@pytest.mark.parametrize("left_out", ["--lengths", "--model", "--cluster"])
def test_arguments_that_are_left_out_are_named(lengths: str, capsys: Captured, left_out: str) -> None:
    pairs = {"--lengths": lengths, "--model": "gpt-7b-384k", "--cluster": "64xA100-40G"}
    del pairs[left_out]
    line = refused([word for pair in pairs.items() for word in pair], capsys)
    assert left_out in line


def test_a_model_that_fills_the_memory_gets_one_line(lengths: str, capsys: Captured) -> None:
    line = refused(["--lengths", lengths, "--model", "llama-70b", "--cluster", "8xA100-40G"], capsys)
    assert "no token fits on a device" in line


def test_why_prints_a_line_for_each_document_that_does_not_fit_and_only_those(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join(["500000", "7", *["410049"] * 3, "410048"]))
    assert main(["--lengths", str(path), *MODEL, "--why"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    *documents, enough = error.splitlines()
    assert [line.split(" has ")[0] for line in documents] == [f"no plan: document {index}" for index in (0, 2, 3, 4)]
    assert enough.startswith("no plan: no number of these devices is enough")
    assert "and 3 more: see --why" in refused(["--lengths", str(path), *MODEL], capsys)


def test_why_of_what_can_be_planned_is_the_plan(lengths: str, capsys: Captured) -> None:
    assert main(["--lengths", lengths, *MODEL, "--why", "--seconds", "5"]) == 0
    out, error = capsys.readouterr()
    assert "proven optimal" in out
    assert error == ""


@pytest.mark.parametrize("content", ["100\n200 300", "100,200,300", " 100\t200\r\n\r\n300\n", "100\n200\n300\n400\n"])
def test_standard_input_is_read_in_every_layout(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, content: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    assert main(["--lengths", "-", *MODEL, "--first", "3", "--json", "--seconds", "0.2"]) == 0
    plan = from_json(capsys.readouterr().out)
    assert (plan.num_documents, plan.num_tokens) == (3, 600)


def test_standard_input_without_lengths_gets_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    for content, expected in (("", "standard input is empty"), ("4\nfive", "standard input, line 2")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(content))
        assert expected in refused(["--lengths", "-", *MODEL], capsys)


def test_lengths_are_read_in_order_and_padded_upwards(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "lengths"
    path.write_text("129 1,128\n\n256")
    assert read_lengths(str(path)) == (129, 1, 128, 256)
    assert main(["--lengths", str(path), *MODEL, "--pad", "128", "--json", "--seconds", "0.2"]) == 0
    plan = from_json(capsys.readouterr().out)
    check(named_problem((256, 128, 128, 256), "gpt-7b-384k", "64xA100-40G"), plan)


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_lengths(str(path))


def command(arguments: list[str], seed: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "seqpar", "plan", *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed})


def test_another_process_with_other_hashes_makes_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(map(str, lognormal(40, 3000, 1.4, 5))))
    runs = [command(["--lengths", str(path), *MODEL, "--json", "--seconds", "0.5"], seed) for seed in ("1", "271828")]
    assert [run.returncode for run in runs] == [0, 0]
    assert [run.stderr for run in runs] == ["", ""]
    plans = [from_json(run.stdout) for run in runs]
    assert {plan.stopped_by for plan in plans} == {"work"}
    assert runs[0].stdout == runs[1].stdout
    assert plans[0].digest == plans[1].digest


def test_a_process_that_cannot_plan_ends_with_2_and_one_line(tmp_path: Path) -> None:
    run = command(["--lengths", str(tmp_path), *MODEL], "0")
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)


@pytest.fixture(scope="module")
def long_tailed() -> Plan:
    return plan_batch(published(lognormal(300, 900, 1.8, 4)), Options(seconds=0.4))


def rows_of(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("  ") and ("all-to-all" in line or "none" in line)]


def test_each_group_has_a_row_with_all_that_there_is_to_know(long_tailed: Plan) -> None:
    page = text(long_tailed, full=True)
    rows = rows_of(page)
    groups = [group for batch in long_tailed.micro_batches
              for group in sorted(batch.groups, key=lambda group: (-group.degree, group.ranks))]  # fmt: skip
    assert len(rows) == len(groups)
    for row, group in zip(rows, groups):
        ranks = f"{group.ranks[0]}-{group.ranks[-1]}" if group.degree > 1 else str(group.ranks[0])
        words = row.split()
        assert words[:4] == [ranks, str(group.degree), group.transport.replace("_", "-"), str(len(group.documents))]
        assert words[4] == f"{group.tokens_per_device:,}"
        assert words[5] == f"{group.memory_bytes / 2**30:.1f}"
        assert words[6:10] == [f"{seconds:.3f}" for seconds in (
            group.compute_seconds, group.communication_seconds, group.fixed_seconds, group.seconds)]  # fmt: skip
        assert words[10].endswith("%")
    assert f"of {long_tailed.capacity_tokens:,}" in page
    assert "of 30" in page


def test_idle_time_is_what_is_left_of_a_micro_batch(long_tailed: Plan) -> None:
    batch = long_tailed.micro_batches[0]
    groups = sorted(batch.groups, key=lambda group: (-group.degree, group.ranks))
    for row, group in zip(rows_of(text(long_tailed, full=True)), groups):
        assert abs(float(row.split()[10].rstrip("%")) / 100 - (1 - group.seconds / batch.seconds)) < 0.0051
    busy = sum(group.seconds * group.degree for group in batch.groups) / (batch.seconds * 64)
    head = next(line for line in text(long_tailed).splitlines() if line.strip().startswith("micro-batch 0"))
    assert head.split()[2:] == [f"{batch.seconds:.3f}", f"{1 - busy:.0%}"]


def test_groups_alike_share_a_row_that_adds_them_up(long_tailed: Plan) -> None:
    folded = rows_of(text(long_tailed))
    many = [line for line in folded if " x" in line.split("all-to-all")[0].split("none")[0]]
    assert many
    counted = sum(int(line.split(" x")[1].split()[0]) for line in many) + len(folded) - len(many)
    assert counted == sum(len(batch.groups) for batch in long_tailed.micro_batches)
    documents = [int(words[words.index("all-to-all" if "all-to-all" in words else "none") + 1].replace(",", ""))
                 for words in map(str.split, folded)]  # fmt: skip
    assert sum(documents) == long_tailed.num_documents


def test_a_row_of_several_groups_shows_the_fullest_device_and_mean_seconds() -> None:
    plan = plan_batch(small_problem([99, 95, 91, 90, 80, 70, 60, 55], degrees=(1,)), Options(seconds=0.1))
    (batch,) = plan.micro_batches
    (row,) = rows_of(text(plan))
    words = row.split()
    assert words[:6] == ["0-7", "1", "x8", "all-to-all", "8", "99"]
    means = [sum(getattr(group, f"{part}seconds") for group in batch.groups) / 8
             for part in ("compute_", "communication_", "fixed_", "")]  # fmt: skip
    assert words[7:11] == [f"{mean:.3f}" for mean in means]


def test_the_header_says_bound_gap_baselines_stage_and_seed(long_tailed: Plan) -> None:
    page = text(replace(long_tailed, note="a note", stopped_by="deadline", seed=77))
    static = next(row for row in long_tailed.baselines if row.name == "static")
    faster = f"{static.seconds / long_tailed.step_seconds:.2f}x as fast"
    for words in (f"{long_tailed.step_seconds:,.4g} s", f"at most {long_tailed.gap:.1%}", f"{static.seconds:,.4g} s",
                  faster, f"{long_tailed.lower_bound_seconds:,.4g} s",
                  "300 documents", "gpt-7b-384k on 64xA100-40G", "seed 77", "a note", "deadline cut planning short",
                  long_tailed.stage.split(",")[0], long_tailed.active_bound.split(" (")[0]):  # fmt: skip
        assert words in page, words
    assert "proven optimal" in text(replace(long_tailed, lower_bound_seconds=long_tailed.step_seconds))


def test_comparing_shows_a_row_for_every_degree(long_tailed: Plan) -> None:
    page = text(long_tailed, compare=True).split("against one degree for all")[1]
    for row in long_tailed.baselines:
        if row.name == "degree":
            assert f"{64 // row.degree} of {row.degree}" in page
            assert f"{row.seconds:.3f}" in page


WIDE: dict[str, Callable[[], Plan]] = {
    "a device": lambda: plan_batch(small_problem([90, 5], devices=1, node=1, degrees=(1,)), Options(seconds=0.1)),
    "odd nodes": lambda: plan_batch(small_problem([250, 90, 80, 5], devices=12, node=6, degrees=(1, 2, 3, 6, 12))),
    "a thousand devices": lambda: plan_batch(published(lognormal(1500, 4000, 1.5, 2), devices=1024),
                                             Options(seconds=0.1, exact=False)),
    "idle ranks": lambda: plan_batch(published([5, 5]), Options(seconds=0.1)),
    "long names": lambda: renamed(plan_batch(small_problem([90, 5]), Options(seconds=0.1))),
}  # fmt: skip


def renamed(plan: Plan) -> Plan:
    return replace(plan, model="m" * 60, cluster="c" * 60, note="words " * 60, active_bound="limited " * 40)


@pytest.mark.parametrize("name", WIDE)
def test_the_table_is_never_wider_than_its_page(name: str) -> None:
    plan = WIDE[name]()
    for page in (text(plan, compare=True), text(plan, compare=True, full=True)):
        assert max(len(line) for line in page.splitlines()) <= 128
        assert str(plan.capacity_tokens) in page.replace(",", "")
        assert shape(plan)[:20] in page


def test_ranks_that_have_nothing_to_do_are_shown() -> None:
    page = text(plan_batch(published([5, 5]), Options(seconds=0.1)))
    assert any("idle" in line and "100%" in line for line in page.splitlines())


def test_shapes_are_short() -> None:
    groups = [PlannedGroup((), degree, "ring", (), 0, 0, 0, 0.0, 0.0, 0.0, 1.0) for degree in (1, 32, 8, 8, 1, 8)]
    plan = plan_batch(published([5]), Options(seconds=0.1))
    batches = (PlannedMicroBatch(tuple(groups), 1.0), PlannedMicroBatch((groups[1],), 1.0))
    assert shape(replace(plan, micro_batches=batches)) == "<32, 8x3, 1x2> <32>"


@pytest.mark.parametrize("suffix", ["svg", "png", "SVG"])
def test_pictures_are_written_beside_the_table(lengths: str, tmp_path: Path, capsys: Captured, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    assert main(["--lengths", lengths, *MODEL, "--plot", str(path), "--json", "--seconds", "0.3"]) == 0
    plan = from_json(capsys.readouterr().out)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n" if suffix == "png" else b"<?xml")
    again = tmp_path / "again.svg"
    plot(plan, str(again))
    if suffix == "svg":
        assert again.read_bytes() == path.read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_picture_that_cannot_be_written_gets_one_line_and_no_plan(lengths: str, capsys: Captured) -> None:
    pytest.importorskip("matplotlib")
    assert "cannot write" in refused(["--lengths", lengths, *MODEL, "--plot", "no/such/place.svg"], capsys)


def test_without_matplotlib_a_picture_says_what_to_install(
    lengths: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(["--lengths", lengths, *MODEL, "--plot", str(tmp_path / "a.svg")], capsys)
    assert "pip install 'seqpar[plot]'" in line
    assert not (tmp_path / "a.svg").exists()
    assert format_of("a/b.PNG") == "png"


def test_json_has_no_more_than_one_line(lengths: str, capsys: Captured) -> None:
    assert main(["--lengths", lengths, *MODEL, "--json", "--seconds", "0.3"]) == 0
    out, error = capsys.readouterr()
    assert (out.count("\n"), error) == (1, "")
    assert json.loads(out)["micro_batches"][0]["groups"][0]["documents"] == [2]
