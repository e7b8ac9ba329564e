"""The pretraining example gives the numbers of one process on many, and ends in one line where it cannot train."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain.py"
TINY = ("--tokens", "128", "--dim", "16", "--heads", "2", "--pattern", "gla softmax", "--sequences", "3",
        "--steps", "3", "--warm-up", "1", "--device", "cpu")  # fmt: skip


def start(arguments, ranks, folder):
    """Run the example under torchrun, or alone where ``ranks`` is 1; no launcher of the tests is the example's."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    told = (
        "RANK",
        "LOCAL_",
        "GROUP_",
        "ROLE_",
        "WORLD_",
        "MASTER_",
        "TORCHELASTIC_",
        "PMI_",
        "MPI_",
        "OMPI_",
        "SLURM_",
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    command = [sys.executable, *launcher, str(EXAMPLE), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    for number, size in enumerate((700, 0, 300, 25, 410, 90)):
        words = [f"{(i * i + number) % 97} words" for i in range(size)]
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(words)[:size])
    return ["--data", str(tmp_path / "text")]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(arguments, ranks, folder, name):
    result = start([*TINY, *arguments, "--log-file", f"{name}.jsonl"], ranks, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 3 and "held out" in result.stdout
    return rows(folder / f"{name}.jsonl")


def check_same(found, expected, tolerance):
    for mine, right in zip(found, expected, strict=True):
        for name in ("loss", "gradient_norm"):
            assert mine[name] == pytest.approx(right[name], rel=tolerance)
        assert (mine["tokens"], mine["learning_rate"]) == (right["tokens"], right["learning_rate"])
    assert found[-1]["held_out_loss"] == pytest.approx(expected[-1]["held_out_loss"], rel=tolerance)
    assert found[-1]["held_out_targets"] == expected[-1]["held_out_targets"]


@pytest.mark.slow
def test_shards_of_replicas_of_sequence_ranks_give_the_numbers_of_one_process(tmp_path, text):
    held = ["--evaluate", *(str(tmp_path / "text" / f"{n}.txt") for n in (2, 3)), "--packing", "windows",
            "--overlap", "5", "--dtype", "float64"]  # fmt: skip
    one = run([*text, *held], 1, tmp_path, "one")
    check_same(run([*text, *held, "--sequence-ranks", "2", "--shard"], 4, tmp_path, "four"), one, 1e-10)
    assert one[-1]["held_out_targets"] == 300 + 25 - 2, "windows that overlap lose no target"


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "flags", [[], ["--shard"], ["--loss-tokens", "64"], ["--compile", "eager"], ["--layout", "striped"]]
)
def test_every_way_of_training_gives_the_numbers_of_one_process(tmp_path, text, flags, dtype):
    held = ["--evaluate", *(str(tmp_path / "text" / f"{n}.txt") for n in (2, 3)), "--dtype", dtype]
    one = run([*text, *held], 1, tmp_path, "one")
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    check_same(run([*text, *held, *flags, "--sequence-ranks", "2"], 4, tmp_path, "four"), one, tolerance)


@pytest.mark.nightly
def test_a_text_that_one_rank_reads_and_that_is_none_ends_all_ranks_in_one_line_each(tmp_path, text):
    (tmp_path / "text" / "6.txt").write_bytes(b"abc\xff")
    result = start([*TINY, *text, "--sequence-ranks", "1", "--steps", "6"], 2, tmp_path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("pretrain.py:")]
    assert lines == [f"pretrain.py: {tmp_path}/text/6.txt: is not UTF-8 at byte 3 (0xff)"] * 2
    assert f"{EXAMPLE}" not in result.stderr.partition("is not UTF-8")[0], "no traceback of ours"
    assert re.search(r"exitcode\s*: 2", result.stderr), result.stderr


# Alone, in this process.


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import pretrain

    return pretrain


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "empty"], "empty: no documents in 0 files"),
        (["--data", "text", "--tokens", "64K"], "which do not fill one sequence of 65536"),
        (["--data", "text", "--tokens", "128", "--packing", "whole"], "documents are to stay whole"),
        (["--data", "text", "--log-file", "no/log"], "cannot write no/log: No such file or directory"),
        (["--data", "text", "--log-file", "text"], "cannot write text: Is a directory"),
        (["--data", "text", "--tokenizer", "text/0.txt"], "text/0.txt: no tokenizer.json"),
        (["--data", "text", "--pattern", "softmx"], "softmx"),
        (["--data", "text", "--steps", "3", "--warm-up", "3"], "expected 0 <= warm_up < steps"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line_and_exit_2(tmp_path, text, example, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert example.main([*TINY, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pretrain.py: ") and message in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


def test_a_step_that_is_not_finite_is_named_and_skipped_or_stops_the_run(tmp_path, text, example, capsys, monkeypatch):
    """The rate is so large that the second step's loss is none."""
    monkeypatch.chdir(tmp_path)
    wild = [*TINY, *text, "--rate", "1e30", "--warm-up", "0", "--log-file", "log"]
    assert example.main(wild) == 1
    said = capsys.readouterr().err
    assert re.match(r"pretrain.py: step 2: loss \S+, norm nan: rank 0 of 1, layer module\.\w+", said), said
    assert example.main([*wild, "--nonfinite", "skip"]) == 0
    notes = [row["note"] for row in rows(tmp_path / "log")]
    assert len(notes) == 3 and notes[0] == "" and notes[2].startswith("skipped: loss")
