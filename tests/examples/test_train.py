"""The training example runs under torchrun and alone, compares its losses, and refuses wrong flags in one line."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
TINY = ["--dim", "16", "--heads", "2", "--layers", "2", "--softmax-every", "2", "--tokens", "96", "--device", "cpu"]


def start(
    arguments: list[str], ranks: int, folder: Path, told_also: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Run the example: under torchrun, or alone where ``ranks`` is 0; ``told_also``: more of the environment."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, str(TRAIN), *arguments]
    # What launched the tests, if anything did, is none of the example's business.
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
    environment = {name: value for name, value in os.environ.items() if not name.startswith(told)} | dict(told_also)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def text(folder: Path) -> list[str]:
    (folder / "text").mkdir()
    for number, size in enumerate((70, 0, 300, 25, 41)):
        (folder / "text" / f"{number}").write_bytes(bytes((i * i + number) % 251 for i in range(size)))
    return ["--data", str(folder / "text")]


def curves(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """What TensorBoard reads: by name the steps of a curve and its values."""
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(folder / "runs" / "train"))
    board.Reload()
    found = {name: board.Scalars(name) for name in board.Tags()["scalars"]}
    return {name: ([one.step for one in curve], [one.value for one in curve]) for name, curve in found.items()}


@pytest.mark.slow
def test_two_ranks_train_to_the_numbers_of_one(tmp_path: Path) -> None:
    run = start([*TINY, *text(tmp_path), "--steps", "3", "--dtype", "float64"], 2, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "2 share each sequence" in run.stdout
    assert "5 documents" in run.stdout and "min 0, median 41" in run.stdout
    found = re.search(r"the same numbers: largest relative difference (\S+) ", run.stdout)
    assert found is not None and float(found[1]) < 1e-12, run.stdout
    assert {name: steps for name, (steps, _) in curves(tmp_path).items()} == {
        "loss": [1, 2, 3], "tokens per second": [1, 2, 3], "bytes sent": [1, 2, 3]
    }  # fmt: skip


@pytest.mark.nightly
def test_replicas_train_on_sequences_of_their_own(tmp_path: Path) -> None:
    arguments = [*TINY, *text(tmp_path), "--steps", "2", "--sequence-ranks", "1", "--logdir", "", "--mixer", "gla"]
    run = start(arguments, 2, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "2, each with a sequence of its own" in run.stdout
    assert "the same numbers" in run.stdout, run.stdout


@pytest.mark.slow
def test_training_by_plans_gives_the_losses_of_one_rank(tmp_path: Path) -> None:
    """Documents of 70 and 300 bytes where a rank holds 64 tokens and two hold 128: those of 300 are left out."""
    arguments = [*TINY, *text(tmp_path), "--tokens", "256", "--longest", "128", "--steps", "3", "--dtype", "float64"]
    planned = ["--plan", "--device-tokens", "64", "--plan-seconds", "0.2", "--plan-out", "times.json"]
    run = start([*arguments, *planned], 2, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "4 documents" in run.stdout and "What groups of ranks cost here" in run.stdout
    assert "3 documents, 136 tokens" in run.stdout, "the plan of the first step, without the empty document"
    assert re.search(r"one degree for all batches +\d+\.\d+ s", run.stdout), run.stdout
    found = re.search(r"the same numbers: largest relative difference (\S+) ", run.stdout)
    assert found is not None and float(found[1]) < 1e-12, run.stdout
    written = json.loads((tmp_path / "times.json").read_text())
    times = written["plans"]
    assert written["ranks"] == 2 and "--plan-seconds" in written["arguments"]
    assert list(times) == ["planned", "static", "best_static"]
    assert all(row["steps"] == 2 and row["measured_seconds"] > 0 for row in times.values())
    drawn = curves(tmp_path)
    assert all(steps == [1, 2, 3] for steps, _ in drawn.values())
    losses = [float(loss) for loss in re.findall(r"^ +\d+ +(\d\.\d{4}) +\d+ ", run.stdout, re.M)]
    assert drawn["loss"][1] == pytest.approx(losses, abs=1e-4) and len(losses) == 3
    assert min(drawn["bytes sent"][1]) > 0 and min(drawn["tokens per second"][1]) > 0
    for name, row in times.items():  # the first step is not in the mean
        for kind in ("measured", "predicted"):
            _, seconds = drawn[f"seconds {kind}/{name}"]
            assert sum(seconds[1:]) / 2 == pytest.approx(row[f"{kind}_seconds"], rel=1e-5)
    assert times["planned"]["predicted_seconds"] <= times["best_static"]["predicted_seconds"]
    assert times["best_static"]["predicted_seconds"] <= times["static"]["predicted_seconds"]


@pytest.mark.nightly
def test_an_output_that_cannot_be_written_is_said_before_the_first_step(tmp_path: Path) -> None:
    arguments = [*TINY, *text(tmp_path), "--plan", "--device-tokens", "64", "--logdir", ""]
    run = start([*arguments, "--plan-out", "no/folder/times.json"], 2, tmp_path)
    assert run.returncode != 0 and "What groups of ranks cost here" not in run.stdout
    assert run.stderr.count("cannot write no/folder/times.json: No such file or directory") == 1


@pytest.mark.nightly
def test_a_document_that_no_group_holds_ends_every_rank_in_one_line(tmp_path: Path) -> None:
    arguments = [*TINY, *text(tmp_path), "--plan", "--device-tokens", "16", "--longest", "80", "--logdir", ""]
    run = start(arguments, 2, tmp_path)
    assert run.returncode != 0
    assert (
        len(re.findall(r"^train.py: document \d has \d\d tokens: one device holds \d\d tokens", run.stderr, re.M)) == 1
    )


@pytest.mark.nightly
def test_a_difference_above_the_tolerance_fails(tmp_path: Path) -> None:
    arguments = [*TINY, *text(tmp_path), "--steps", "4", "--dtype", "bfloat16", "--logdir", "", "--tolerance", "1e-12"]
    run = start(arguments, 2, tmp_path)
    assert run.returncode != 0
    assert "FAILED: largest relative difference" in run.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0, got 'nan'"),
        (["--heads", "3"], "--heads 3 must divide --dim 128 into heads of an even size"),
        (["--kv-heads", "3"], "--kv-heads 3 must divide --heads 4"),
        (["--sequence-ranks", "2"], "--sequence-ranks 2 must divide the number of ranks, 1"),
        (["--data", "nowhere"], "--data nowhere: no such file or directory"),
        (
            ["--plan", "--sequence-ranks", "1"],
            "--plan chooses who shares what, batch by batch: leave --sequence-ranks out",
        ),
        (["--plan", "--plan-seconds", "0"], "--plan-seconds: expected a number above 0, got '0'"),
        (["--pattern", "memmamba"], "memmamba is not built: its equations were not at hand"),
        (["--timeout", "1e300"], "--timeout: expected seconds above 0 and below a day, got '1e300'"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    run = start(arguments, 0, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"train.py: {message}\n")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but MASTER_ADDR is not: use torchrun, or set it to "
         "rank 0's host"),
    ],
)  # fmt: skip
def test_what_no_launcher_would_say_is_refused_in_one_line(told: dict[str, str], message: str, tmp_path: Path) -> None:
    run = start(["--steps", "1"], 0, tmp_path, told)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"train.py: {message}\n")


def test_a_rank_that_does_not_come_is_named_after_the_timeout(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    run = start(["--timeout", "1"], 0, tmp_path, told)
    assert run.returncode == 1 and run.stdout == "" and "Traceback" not in run.stderr
    assert "train.py: rank 0 of 2: connect with rank 0 at localhost:" in run.stderr


@pytest.mark.nightly
def test_on_many_ranks_only_one_speaks(tmp_path: Path) -> None:
    run = start(["--mixer", "mamba"], 2, tmp_path)
    assert run.returncode != 0
    assert run.stderr.count("train.py: --mixer: invalid choice: 'mamba'") == 1


def test_help_names_every_flag(tmp_path: Path) -> None:
    run = start(["--help"], 0, tmp_path)
    assert run.returncode == 0 and run.stderr == ""
    assert "--sequence-ranks N" in run.stdout and "alone" in run.stdout


@pytest.mark.nightly
def test_any_pattern_of_the_catalog_trains(tmp_path: Path) -> None:
    arguments = ["--pattern", "gla softmax", "--dim", "16", "--heads", "2", "--tokens", "96", "--dtype", "float64"]
    run = start([*arguments, *text(tmp_path), "--steps", "2", "--logdir", ""], 2, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "1 gla + 1 softmax" in run.stdout and "the same numbers" in run.stdout


def test_an_unknown_layer_in_a_pattern_is_one_line(tmp_path: Path) -> None:
    run = start(["--pattern", "gla perceiver"], 0, tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "there is no layer 'perceiver'; the catalog has softmax, " in run.stderr
