"""The bench of recurrent layers runs, and its timeline has every layer of every rank, in the order of its work."""

from itertools import pairwise

import pytest

pytest.importorskip("matplotlib")

from bench.models import recurrent
from seqpar.collectives import run_ranks


@pytest.fixture
def small(monkeypatch):
    for name, value in {"LAYERS": 3, "DIM": 4, "TOKENS": 12, "SPEED_TOKENS": 8}.items():
        monkeypatch.setattr(recurrent, name, value)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_timeline_has_every_layer_forwards_and_backwards(layout, small, tmp_path):
    (result, ran), _ = run_ranks(2, recurrent.wavefront, layout, 1)
    assert result["processes"] == 2 and len(result["seconds"]) == len(result["of_one"]) == 2
    for part in ran:
        assert [(each.layer, each.backward) for each in part] == [(n, False) for n in range(3)] + [
            (n, True) for n in reversed(range(3))
        ]
        assert all(each.start <= each.end for each in part)
        assert all(before.end <= after.start for before, after in pairwise(part))
    recurrent.draw(ran, result["ratio"], tmp_path / "timeline.svg")
    assert "process 1" in (tmp_path / "timeline.svg").read_text()


def test_speed_is_that_of_as_many_heads(small):
    found = recurrent.speed(2, 2)
    assert found["heads"] == 2 and found["ratio"] > 0
