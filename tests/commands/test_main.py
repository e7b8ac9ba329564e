"""The seqpar command: what it prints, and its exit status."""

import importlib.metadata
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from seqpar.collectives.c10d import available_backends
from seqpar.collectives.scan import ALGORITHMS
from seqpar.commands.main import main
from seqpar.commands.verify import _awkward
from seqpar.crossing.attention import TRANSPORTS
from seqpar.sharding.shard import LAYOUTS
from seqpar.training import extras
from seqpar.verification import doctor

MODELS = """
import torch
from torch import nn

import seqpar
from seqpar.models import HybridConfig, HybridLM

class Cutless(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = HybridLM(HybridConfig(vocabulary=16, dim=16, layers=2, heads=2, softmax_every=2))

    def forward(self, tokens, cut):
        counts = [piece.count for piece in cut.shard.pieces_of(cut.shard.rank)]
        return self.inner(tokens, seqpar.Cut.whole(counts))

@seqpar.sequence_parallel(layout="striped")
def wrapped():
    return HybridLM(HybridConfig(vocabulary=16, dim=16, layers=2, heads=2, softmax_every=2))

def no_model():
    return 3

def wants(dim):
    return nn.Linear(dim, dim)

def fails():
    raise KeyError("a key")

def takes_no_cut():
    return nn.Sequential(nn.Embedding(16, 4), nn.Linear(4, 16))

class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(16, 4), nn.Embedding(32, 4), nn.Linear(4, 16)

    def forward(self, tokens, cut):
        return self.head(self.token(tokens) + self.place(cut.shard.positions))
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text(MODELS)
    (tmp_path / "nosyntax.py").write_text("def build(:\n")
    (tmp_path / "stumbles.py").write_text("\n\nimport math\nmath.sqrt(-1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mymodels", None)


def error_of(arguments, capsys):
    """The one line on stderr of a command that must end with status 2."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("seqpar"), (status, out, err)
    return err


def test_verify_prints_a_table_and_ends_with_0(capsys):
    assert main(["verify", "--ranks", "3", "--lengths", "5,0,17,1", "--layout", "zigzag"]) == 0
    out = capsys.readouterr().out
    assert "3 ranks, zigzag layout" in out and "Equal" in out and "46 tokens" in out


def test_verify_as_json(capsys):
    assert main(["verify", "--ranks", "2", "--tokens", "31", "--mixer", "gla", "--scan", "ring", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["scan"] == "ring" and report["num_tokens"] == 62
    assert {"name", "value", "tolerance", "ok", "guards_against", "detail"} == set(report["rows"][0])


def test_all_goes_through_every_way_of_cutting(capsys):
    assert main(["verify", "--all", "--ranks", "2", "--tokens", "20", "--layout", "striped", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert len(reports) == len(TRANSPORTS) * len(ALGORITHMS) and {r["layout"] for r in reports} == {"striped"}
    assert {r["transport"] for r in reports} == set(TRANSPORTS) and {r["scan"] for r in reports} == set(ALGORITHMS)


def test_all_prints_a_row_each(capsys):
    arguments = ["verify", "--all", "--ranks", "2", "--tokens", "20", "--transport", "ring", "--scan", "ring"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(layout in out for layout in LAYOUTS) and "Equal in all 3 ways of cutting" in out


def test_a_difference_ends_with_1(models, capsys):
    assert main(["verify", "--ranks", "2", "--model", "mymodels:Cutless"]) == 1
    out = capsys.readouterr().out
    assert "Not equal" in out and "DIFFERS" in out
    assert main(["verify", "--all", "--ranks", "2", "--layout", "zigzag", "--model", "mymodels:Cutless"]) == 1
    assert "12 of 12 ways of cutting differ" in capsys.readouterr().out


def test_a_wrapped_model_keeps_its_options(models, capsys):
    assert main(["verify", "--ranks", "2", "--model", "mymodels:wrapped", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "striped"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "required: command"),
        (["verfy"], "there is no command 'verfy', did you mean 'verify'?"),
        (["verify", "--rank", "x"], "whole number of at least 1"),
        (["verify", "--ranks", "0"], "whole number of at least 1, got '0'"),
        (["verify", "--layout", "diagonal"], "invalid choice: 'diagonal'"),
        (["verify", "--lengths", "5,-1"], "such as 5,0,17"),
        (["verify", "--lengths", "0,0"], "not empty"),
        (["verify", "--lengths", "5,6", "--tokens", "12"], "sum to 11, but --tokens is 12"),
        (["verify", "--unheard"], "unrecognized arguments: --unheard"),
        (["verify", "--model", "nowhere"], "MODULE:FACTORY"),
        (["verify", "--model", "nowhere:build"], "cannot import nowhere"),
        (["verify", "--model", "mymodels:absent"], "no function or class absent"),
        (["verify", "--model", "mymodels:no_model"], "must return a torch module, got int"),
        (["verify", "--model", "..:x"], "MODULE:FACTORY, such as mymodel:build, got '..:x'"),
        (["verify", "--model", ":x"], "MODULE:FACTORY"),
        (["verify", "--model", "nosyntax:build"], "cannot import nosyntax: SyntaxError: invalid syntax (nosyntax.py, "),
        (["verify", "--model", "stumbles:build"], "stumbles: ValueError: math domain error (stumbles.py, line 4)"),
        (["verify", "--model", "mymodels:fails"], "fails() failed: KeyError: 'a key' (mymodels.py, line "),
        (["verify", "--model", "mymodels:wants"], "wants() failed: TypeError: wants() missing 1 required positional"),
        (["verify", "--model", "mymodels:takes_no_cut"], "Sequential.forward must take (tokens, cut), it takes (input"),
        (["verify", "--model", "mymodels:wrapped", "--vocabulary", "17"], "17, but the model's embedding holds 16"),
        (
            ["verify", "--model", "mymodels:Positions", "--vocabulary", "30", "--ranks", "2"],
            "below the model's vocabulary of 16",
        ),
        (["verify", "--model", "mymodels:Positions", "--lengths", "40", "--ranks", "2"], "in rows of 40: index out"),
        (["verify", "--ranks", "2382"], "as many threads of this process, and it takes 256 at most"),
        (["calibrate", "--ranks", "2382"], "as many threads of this process, and it takes 256 at most"),
        (["calibrate", "--model", "..:x"], "MODULE:FACTORY"),
        (["calibrate", "--model", "mymodels:fails"], "fails() failed: KeyError: 'a key'"),
        (["calibrate", "--model", "mymodels:takes_no_cut"], "Sequential.forward must take (tokens, cut)"),
        (["doctor", "now"], "unrecognized arguments: now"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments, why, models, capsys):
    assert why in error_of(arguments, capsys)


def test_version_and_help(capsys):
    for arguments, expected in (
        (["--version"], f"seqpar {importlib.metadata.version('seqpar')}"),
        (["--help"], "Exit status: 0 all is well"),
        (["verify", "--help"], "under torchrun"),
        (["doctor", "--help"], "Nothing that is missing is an error"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert expected in " ".join(capsys.readouterr().out.split())


def test_default_lengths_are_awkward_and_add_up():
    for tokens in range(1, 300):
        assert sum(_awkward(tokens)) == tokens and 0 in _awkward(tokens)
    assert 1 in _awkward(97)


def test_doctor_shows_what_is_there_and_what_for(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "gloo", "nccl", "triton", "mpiexec", "apex", "shared memory"):
        assert name in out
    assert main(["doctor", "--json"]) == 0
    items = json.loads(capsys.readouterr().out)
    assert {item["state"] for item in items} <= {"found", "missing", "unfit"}
    assert all(item["used_for"] for item in items if item["state"] != "found")


def test_doctor_never_fails_because_something_is_missing(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    def unreadable(path):
        raise OSError(path)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", unreadable)
    monkeypatch.setattr(doctor, "_cgroup_limit", lambda: str(int("not a number")))
    states = {item.name: item.state for item in doctor.examine()}
    assert {states[name] for name in ("mpi4py", "mpiexec", "PuLP", "shared memory", "cgroup limit")} == {"missing"}


@pytest.mark.parametrize(
    ("apex", "state", "says"),
    [
        (extras.Apex("0.9", (), "0.9 is an unrelated package of that name"), "unfit", "unrelated"),
        (extras.Apex("0.1", ("amp_C",), ""), "found", "NVIDIA 0.1, with amp_C"),
        (None, "missing", ""),
    ],
)
def test_doctor_knows_one_apex_from_the_other(monkeypatch, apex, state, says):
    monkeypatch.setattr(extras, "find_apex", lambda: apex)
    item = doctor._apex()
    assert item.state == state and says in item.found


def test_the_command_runs_as_a_module_and_under_torchrun():
    program = [sys.executable, "-m", "seqpar"]
    alone = subprocess.run([*program, "verify", "--lengths", "1,x"], capture_output=True, text=True, timeout=1200)
    assert alone.returncode == 2 and "Traceback" not in alone.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = subprocess.run(
        [*torchrun, "-m", "seqpar", "verify", "--tokens", "23", "--json"], capture_output=True, text=True, timeout=1200
    )
    assert launched.returncode == 0, launched.stderr
    report = json.loads(launched.stdout)
    assert report["ok"] and report["ranks"] == 2


def test_planning_starts_without_torch(tmp_path):
    """The installed command, with a torch in the way that cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "lengths.txt").write_text("48000\n100000\n48000\n")
    command = "import sys; sys.path.insert(0, '.'); from seqpar.commands.main import main; sys.exit(main())"
    model = ["--model", "gpt-7b-384k", "--cluster", "64xA100-40G"]
    planned, verified = (
        subprocess.run(
            [sys.executable, "-c", command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=1200
        )
        for words in (["plan", "--lengths", "lengths.txt", "--json", *model], ["verify"])
    )
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["num_documents"] == 3
    assert verified.returncode != 0 and "no torch here" in verified.stderr


def test_plan_is_a_command_like_the_others(tmp_path, capsys):
    (tmp_path / "lengths.txt").write_text("48000\n100000\n48000\n")
    model = ["--model", "gpt-7b-384k", "--cluster", "64xA100-40G"]
    assert main(["plan", "--lengths", str(tmp_path / "lengths.txt"), "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)["num_documents"] == 3
    for words, says in (
        (["--seconds", "0", *model], "expected seconds above 0"),
        (["--model", "gpt-7b-384k"], "--model gpt-7b-384k needs a --cluster, such as 64xH100-80G"),
        (["--model", "nowhere.json"], "cannot read nowhere.json: No such file or directory"),
        (["--model", "nowhere.json", "--cluster", "8xA100-40G"], "nowhere.json has its own cluster; leave it out"),
    ):
        assert says in error_of(["plan", "--lengths", str(tmp_path / "lengths.txt"), *words], capsys)


def test_backends_are_those_of_this_build_of_torch():
    found = available_backends()
    assert found["gloo"] and set(found) == {"gloo", "nccl", "mpi"}
    assert {item.name: item.state == "found" for item in doctor._backends() if item.name in found} == found
