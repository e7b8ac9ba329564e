"""The measurements of layers, on sequences so short that they say nothing of speed."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench.models import layers
from seqpar.layers.catalog import find
from seqpar.layers.entry import Sizes


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.models.layers", *arguments])
    return layers.main()


def test_rows_are_measured_written_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    out, picture = tmp_path / "layers.json", tmp_path / "layers.svg"
    written = ["--tokens", "64", "128", "--dim", "16", "--out", str(out), "--plot", str(picture)]
    assert bench(monkeypatch, "--layers", "token_shift", *written) == 0
    assert bench(monkeypatch, "--layers", "token_shift", "gla", *written, "--resume") == 0
    assert " - " not in capsys.readouterr().out  # what a table shows for lengths that were left out
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["layers"]] == ["token_shift", "gla"]
    for row in report["layers"]:
        assert set(row["tokens_per_second"]) == {"64", "128"} and min(row["tokens_per_second"].values()) > 0
        assert set(row["work"]) == {"2", "4"} and row["kept_bytes"] > 0
    assert "<svg" in picture.read_text()


def test_kept_bytes_count_each_storage_once_and_no_parameter() -> None:
    """A token shift keeps its input and, for the gradient of its weights, the difference to the row before."""
    layer = find("token_shift").make(Sizes(16, 4))
    assert layers.kept_bytes(layer, torch.randn(1, 100, 16)) == pytest.approx(2 * 4 * 16, rel=0.03)


def test_documents_are_as_long_as_a_layer_can_take() -> None:
    assert layers.documents(find("gla").make(Sizes(16, 4)), 20000) == [20000]
    assert layers.documents(find("linformer").make(Sizes(16, 4)), 20000) == [8192, 8192, 3616]
