"""The measurement of many documents, on sequences so short that they say nothing of speed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.models import documents


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.models.documents", *arguments])
    return documents.main()


def test_rows_are_measured_written_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    out = tmp_path / "documents.json"
    sizes = ["--tokens", "320", "--documents", "20", "--dim", "16", "--rounds", "1", "--out", str(out)]
    assert bench(monkeypatch, "--layers", "softmax", "token_shift", "vig", *sizes) == 0
    report = json.loads(out.read_text())
    assert [(row["name"], row["documents"]) for row in report["rows"]] == [("token_shift", 20), ("vig", 20)]
    assert all(min(row[key] for key in ("seconds", "many", "mixed", "new")) > 0 for row in report["rows"])
    assert "token_shift" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--documents", "33", "--tokens", "64"], "--documents must be 2 to 32, half of --tokens, got 33"),
        (["--documents", "2", "--tokens", "4"], "--tokens must be at least 64, got 4"),
        (["--heads", "5"], "--heads 5 must divide --dim 64"),
        (["--layers", "nothing"], "there is no layer 'nothing'"),
    ],
)
def test_what_does_not_fit_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys, arguments, fault) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(monkeypatch, *arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and fault in said and said.count("\n") == 1


@pytest.mark.parametrize("unit", [1, 16])
def test_drawn_documents_hold_all_tokens(unit: int) -> None:
    for count in (2, 7, 20):
        lengths = documents.drawn(320, count, unit, torch.Generator().manual_seed(count))
        assert sum(lengths) == 320 and len(lengths) == count and all(length % unit == 0 < length for length in lengths)
