"""Short runs end with exit code 0, and one that does not is seen."""

from collections import Counter

import pytest

from bench import endings


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("world", list(endings.BODIES))
def test_short_runs_end_well(world: str) -> None:
    assert endings.measure(world, 2, 2).codes == Counter({0: 2})


@pytest.mark.slow
@pytest.mark.parametrize(("world", "code"), [("threads", -6), ("processes", -6), ("torchrun", 1)])
def test_a_run_that_aborts_is_counted(world: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(endings.BODIES, world, "import os; os.abort()")
    assert endings.measure(world, 1, 1) == endings.Endings(world, Counter({code: 1}))
    assert endings.main(["--runs", "1", "--worlds", world]) == 1


@pytest.mark.parametrize("wrong", ["--runs=0", "--at-once=-1", "--worlds=threads,fibres"])
def test_wrong_arguments_are_said_in_one_line(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert endings.main([wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1
