"""The placement bench measures, checks and writes what it found."""

import json

import pytest

from bench.plans.placement import MINIMALLOC, best_greedy, main, measure
from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.placement_file import read_placement_file
from tests.offload.placement.placements import endless, planted


@pytest.fixture
def folder(tmp_path):
    for name, seed in (("A", 1), ("B", 2)):
        rows = [f"{b.id},{b.birth},{b.death},{b.size}" for b in planted(seed, 30)]
        (tmp_path / f"{name}.1048576.csv").write_text("\n".join(["id,lower,upper,size", *rows]))
    (tmp_path / "notes.csv").write_text("not a problem")
    return tmp_path


def test_all_problems_are_measured_and_written(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["--data", str(folder), "--seconds", "20", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [problem["name"] for problem in report["problems"]] == ["A", "B"]
    assert all(problem["fits"] and problem["status"] == "optimal" for problem in report["problems"])
    assert "2 of 2 fit" in capsys.readouterr().out


def test_what_does_not_fit_in_time_is_told(tmp_path, capsys):
    rows = [f"{b.id},{b.birth},{b.death},{b.size}" for b in endless()]
    (tmp_path / "hard.1048576.csv").write_text("\n".join(["id,lower,upper,size", *rows]))
    result = measure(tmp_path / "hard.1048576.csv", 0.1)
    assert not result.fits and result.gap > 0 and result.peak <= result.greedy_peak
    assert main(["--data", str(tmp_path), "--seconds", "0.1"]) == 1
    assert "0 of 1 fit" in capsys.readouterr().out


def test_a_folder_without_problems_is_refused(tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(tmp_path)])
    assert ended.value.code == 2


def test_the_problems_travel_with_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems = sorted(MINIMALLOC.glob("*.csv"))
    assert [path.name.split(".")[0] for path in problems] == [*"ABCDEFGHIJK", "input"]
    assert all(read_placement_file(path) for path in problems)


def test_the_best_greedy_order_counts():
    assert best_greedy([Buffer("a", 4, 0, 2), Buffer("b", 4, 2, 4), Buffer("c", 2, 0, 4)]) == 6
