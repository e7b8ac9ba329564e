"""The planning benchmark runs on small cases and writes what it says."""

import json
from pathlib import Path

import pytest

from bench.plans.planning import TARGETS, judged, main, measure, parse, shapes
from bench.plans.planning_cases import QUICK, kept, lognormal, random_problem, sections
from seqpar.planner import Options, plan_batch
from seqpar.planner.problem.explain import reasons
from seqpar.planner.problem.lengths import read_lengths


def test_it_writes_figures_that_agree_with_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "planning.json"
    assert main(["--quick", "--only", "published,small", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["command"].startswith("python -m bench.plans.planning --quick")
    assert {"python", "numpy", "pulp", "highspy", "cores"} <= set(content["machine"])
    first = content["results"][0]
    assert first["shapes"] == "<32, 8x4>"
    assert first["step_seconds"] == pytest.approx(3.8589, abs=5e-5)
    for row in content["results"]:
        assert row["lower_bound_seconds"] <= row["step_seconds"] <= row["best_static_seconds"] <= row["static_seconds"]
        assert row["gap"] == pytest.approx(row["step_seconds"] / row["lower_bound_seconds"] - 1, abs=1e-5)
    assert all(row["met"] for row in content["targets"] if row["what"] != "slowest planning, s")
    shown = capsys.readouterr()
    assert "3.859" in shown.out and "published" in shown.err


def test_a_target_that_is_missed_says_so() -> None:
    result = measure(next(sections()["published"](QUICK, Path())))
    rows = judged([result])
    assert {row["section"] for row in rows} == {"published"}
    assert len(rows) == sum(target.sections == "published" for target in TARGETS)
    slower = type(result)(**{**vars(result), "step_seconds": 4.0, "gap": 0.1})
    assert [row["met"] for row in judged([slower])][:3] == [False, False, False]


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--wikipedia", "no-such-file"], "no-such-file"),
        (["--only", "fast"], "no section fast"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert words in capsys.readouterr().err


def test_the_lengths_travel_with_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read_lengths(str(parse([]).wikipedia))) == 32_768


def test_lengths_are_padded_and_cut_as_published() -> None:
    assert kept([1, 128, 129, 191_872, 191_873], 192_000) == [128, 128, 256, 191_872]
    lengths = lognormal(200, 700, 1.8, 1)
    assert len(lengths) == 200 and max(lengths) <= 384_000 - 128 and all(length % 128 == 0 for length in lengths)


def test_random_batches_are_of_all_sorts_and_can_be_planned() -> None:
    problems = [random_problem(seed) for seed in range(60)]
    assert not any(reasons(problem) for problem in problems)
    assert len({problem.costs.name for problem in problems}) >= 6
    degrees = {kind.degree for problem in problems for kind in problem.costs.kinds}
    assert any(degree & (degree - 1) for degree in degrees)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "planning.svg"
    assert main(["--quick", "--only", "published", "--plot", str(path)]) == 0
    assert path.read_text().startswith("<?xml")


def test_shapes_are_written_as_in_papers() -> None:
    plan = plan_batch(next(sections()["published"](QUICK, Path())).problem, Options(seconds=0.5))
    assert shapes(plan) == "<32, 8x4>"
