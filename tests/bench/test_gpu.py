"""The measurements on a GPU, run once and tiny on whatever is here, and the figures that they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import readme
from bench.ops import gpu
from bench.ops.gpu_cases import OURS, SHAPES, Shape, contests, cut_pass
from bench.ops.gpu_measure import ceilings, machine, medians
from bench.ops.roofline import Card, linear
from seqpar.ops import problems
from seqpar.ops.decayed_linear_attention import DecayedLinearAttention
from seqpar.ops.delta_rule import DeltaRule
from seqpar.ops.selfcheck import placed, random_tensors, relative_error

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


@pytest.fixture(scope="module")
def result():
    return gpu.run(DEVICE, smoke=True, rounds=1, say=lambda line: None, impl="reference")


def test_everything_is_measured_once(result):
    ops = {row["op"] for row in result["ops"]}
    assert {"linear attention, vector decay", "delta rule, scalar gate", "softmax attention, causal"} <= ops
    assert {row["op"] for row in result["ops"] if row["contender"] == OURS} == ops
    assert all(row["layer"] and not row["failed"] and row["flatness"] >= 1 for row in result["layers"])
    assert {row["op"] for row in result["cutting"]} >= {"linear attention, none decay", "delta rule, scalar gate"}
    assert all(list(row["over_uncut"]) == ["1", "2"] for row in result["cutting"])
    json.dumps(result)


def test_nothing_of_ours_fails(result):
    failed = [row for row in result["ops"] if not isinstance(row["both_seconds"], float) and row["contender"] == OURS]
    assert not failed


def test_the_readme_shows_when_and_on_what(result, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    for _ in range(2):
        readme.put(path, "gpu", gpu.markdown(result))
    text = path.read_text()
    assert text.startswith("before\n<!-- gpu -->\nTaken on 20") and text.endswith("\n<!-- /gpu -->\nafter\n")
    assert "old" not in text and torch.__version__ in text and text.count("Taken on") == 1
    assert "| linear attention, none decay | 1x17x1x16 | seqpar |" in text
    with pytest.raises(ValueError, match="<!-- kernels -->"):
        readme.put(path, "kernels", "")


def test_the_committed_readme_has_places_for_the_figures(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "bench" / "README.md").read_text())
    for name in ("gpu", "kernels"):
        readme.put(copy, name, "figures")
    assert copy.read_text().count("figures\n<!-- /") == 2


def test_ratios_and_ceilings_are_those_of_the_row():
    contest = next(contests(Shape(1, 8, 1, 4), CPU, torch.bfloat16, "reference"))
    card = Card("slow", 1e3, 1e30)
    row = gpu.row_of(contest, "other", [2.0, "OutOfMemoryError: full"], {f"{OURS}|0": 4.0, f"{OURS}|1": 1.0}, card)
    assert row["forward_over_ours"] == 0.5 and row["both_seconds"].startswith("OutOfMemory")
    assert row["forward_of_ceiling"] == contest.work.forward_bytes / 1e3 / 2.0 and "both_of_ceiling" not in row
    assert gpu.shown(0.001, 0.5) == "1.000 (50 %)" and gpu.shown("no", None) == "failed"
    assert contest.work == linear(1, 8, 1, 4, 4, 2)


def test_a_contender_that_fails_is_named_and_the_others_go_on():
    def broken():
        raise RuntimeError("out of memory\nin two lines")

    found = medians({"broken": broken, "fine": lambda: None}, CPU, 3)
    assert found["broken"] == "RuntimeError: out of memory\nin two lines" and isinstance(found["fine"], float)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_an_op_whose_sequence_is_cut_gives_what_it_gives_uncut(ranks):
    for problem in (*problems.decayed(DecayedLinearAttention, 8, 30), *problems.delta(DeltaRule, 8, 30)):
        tokens, shared = (placed(x, CPU, torch.float64) for x in (problem.tokens, problem.shared))
        (d_out,) = random_tensors(2, tokens[2].shape)
        op = problem.build("reference")
        (out, gradients), (cut_out, cut_gradients) = (cut_pass(op, tokens, shared, d_out, n) for n in (1, ranks))
        errors = [relative_error(*pair) for pair in zip((cut_out, *cut_gradients), (out, *gradients), strict=True)]
        assert max(errors) < 1e-12, problem.name


def test_parts_can_be_measured_one_by_one_and_put_together(result, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "kernels_are_interpreted", lambda: False)
    out = tmp_path / "gpu.json"
    for part in ("layers", "cutting"):
        assert gpu.main(["--smoke", "--part", part, "--out", str(out), "--add"]) == 0
    found = json.loads(out.read_text())
    assert not found["ops"] and len(found["layers"]) == len(result["layers"])
    assert len(found["cutting"]) == len(result["cutting"])
    assert "Tokens per second" in capsys.readouterr().out
    other = found | {"machine": found["machine"] | {"torch": "1.0"}}
    with pytest.raises(ValueError, match="write another file"):
        gpu.joined(other, found)


@pytest.mark.parametrize("op", ["linear attention, none decay", "softmax attention, causal"])
def test_kernels_of_an_op_chosen_by_name(op):
    pytest.importorskip("triton")
    found = gpu.run(DEVICE, smoke=True, rounds=1, say=lambda line: None, parts=["ops"], only=op, impl="triton")
    assert {row["op"] for row in found["ops"]} == {op} and not found["layers"] and found["impl"] == "triton"
    assert isinstance(found["ops"][0]["both_seconds"], float), found["ops"][0]


def test_ceilings_and_the_machine_are_named():
    card, facts = ceilings(CPU, small=True), machine(CPU)
    assert card.bytes_per_second > 1e6 and card.flops_per_second > 1e6
    assert facts["torch"] == torch.__version__ and "CPU" in facts["device"] and len(facts["taken"]) == 10


def test_the_shapes_are_those_that_others_publish():
    assert SHAPES[0] == (1, 8192, 96, 128) and len(SHAPES) == 6
    assert gpu.LENGTHS[0] == 1024 and gpu.LENGTHS[-1] == 92 * 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "bench.ops.gpu: there is no CUDA device\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_make_gpu_says_so_in_one_line():
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"GPU_PYTHON={sys.executable}"],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1 and "there is no CUDA device" in done.stdout
