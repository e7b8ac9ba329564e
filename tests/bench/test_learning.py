"""The learning runs: that they ask what they say they ask, and their two shortest runs."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bench.models import learning


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.models.learning", *arguments])
    return learning.main()


def test_every_query_asks_for_a_key_that_was_there_and_is_answered_by_its_value() -> None:
    tokens, labels = learning.pairs_and_queries(torch.Generator().manual_seed(0), 16)
    assert tokens.shape == labels.shape == (16, 2 * (learning.PAIRS + learning.QUERIES))
    for row, answers in zip(tokens.tolist(), labels.tolist()):
        seen = dict(zip(row[: 2 * learning.PAIRS : 2], row[1 : 2 * learning.PAIRS : 2]))
        asked = row[2 * learning.PAIRS :: 2]
        assert len(seen) == learning.PAIRS and len(set(asked)) == learning.QUERIES
        assert answers[: 2 * learning.PAIRS] == [-100] * 2 * learning.PAIRS
        assert answers[2 * learning.PAIRS :: 2] == [-100] * learning.QUERIES
        assert answers[2 * learning.PAIRS + 1 :: 2] == [seen[key] for key in asked]


def test_accuracy_counts_answers_only() -> None:
    tokens, labels = (x.reshape(1, -1) for x in learning.pairs_and_queries(torch.Generator().manual_seed(1), 4))
    right = torch.nn.functional.one_hot(tokens.roll(-1, 1), learning.KEYS + learning.VALUES).float()
    assert learning.accuracy_of(right, labels) == 1.0
    right[:, 2 * learning.PAIRS :: 2] *= -1  # at every query
    assert learning.accuracy_of(right, labels) == 0.0


def test_entropy_of_bytes_that_are_all_alike_often() -> None:
    assert learning.unigram_entropy(torch.arange(256).repeat(3)) == pytest.approx(math.log(256))


def test_rounded_weights_are_off_by_half_a_unit_at_most() -> None:
    initial = learning.decoder("token_shift", 0.1)
    for before, after in zip(initial.parameters(), learning.rounded(initial).parameters()):
        assert ((after - before).abs() <= torch.finfo(torch.float32).eps * before.abs()).all()
    assert any((a != b).any() for a, b in zip(initial.parameters(), learning.rounded(initial).parameters()))


def test_runs_are_written_and_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, picture = tmp_path / "learning.json", tmp_path / "learning.svg"
    short = ["--steps", "2", "--part", "text", "--out", str(out), "--plot", str(picture)]
    assert bench(monkeypatch, "--layers", "token_shift", *short) == 0
    assert bench(monkeypatch, "--layers", "token_shift", "short_convolution", *short, "--resume") == 0
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["text"]] == ["token_shift", "short_convolution"]
    assert "<svg" in picture.read_text()
    assert all(row["difference"] < 1e-5 and 4 < row["loss"] < 6 for row in report["text"])
