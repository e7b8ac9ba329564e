"""The kernels' binaries for GPUs that are not here: no spills, matrix instructions, shared memory within the limit.

Kernels are compiled in processes of their own: in this one the interpreter may have taken their place.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.ops import roofline
from bench.ops.kernels import as_json, from_json, main, markdown, parser, show
from bench.ops.kernels_cases import BUILDERS, cases
from bench.ops.kernels_compile import SHARED_LIMIT, Binary, Dots
from bench.ops.kernels_record import job, recorded

ROOT = Path(__file__).parent.parent.parent
OPS = ROOT / "seqpar" / "ops"

TOYS = """
import dataclasses, json, torch
from bench.ops.kernels_compile import compiled
from bench.ops.kernels_record import jobs
from tests.ops.toys import toy_kernels as toy

def shaped(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")

calls = {
    "half": lambda: toy.matmul(shaped(torch.bfloat16, 128, 64), shaped(torch.bfloat16, 64, 64)),
    "few rows": lambda: toy.matmul(shaped(torch.bfloat16, 16, 64), shaped(torch.bfloat16, 64, 64)),
    "one warp": lambda: toy.matmul(shaped(torch.bfloat16, 64, 128), shaped(torch.bfloat16, 128, 128), warps=1),
    "single": lambda: toy.matmul(shaped(torch.float32, 64, 16), shaped(torch.float32, 16, 64)),
    "large": lambda: toy.matmul(shaped(torch.bfloat16, 64, 512), shaped(torch.bfloat16, 512, 256)),
    "add": lambda: toy.add(shaped(torch.float32, 300)),
}
found = {}
for name, call in calls.items():
    for architecture in ("sm_90", "gfx942"):
        for job in jobs(name, call, architecture):
            binary = compiled(job)
            found[f"{name}, {architecture}"] = {**dataclasses.asdict(binary), "faults": binary.faults()}
print(json.dumps(found))
"""


def without_interpreter():
    return {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, "OMP_NUM_THREADS": "1"}


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=without_interpreter(), capture_output=True, text=True, timeout=1200
    )


# The table sees what it is there to see.


@pytest.fixture(scope="module")
def toys():
    done = run("-c", TOYS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_good_kernel_has_no_faults_and_uses_the_matrix_units(toys):
    hopper, amd = toys["half, sm_90"], toys["half, gfx942"]
    assert hopper["faults"] == amd["faults"] == []
    assert hopper["warp_group_instructions"] >= 1 and hopper["dots"] == hopper["large_dots"] == 1
    assert amd["matrix_instructions"] >= 1
    assert hopper["tensor_bytes"] == 2 * (128 * 64 + 64 * 64) + 4 * 128 * 64 and hopper["grid"] == [2]


def test_tiles_of_few_rows_use_the_smaller_matrix_instructions(toys):
    few = toys["few rows, sm_90"]
    assert few["matrix_instructions"] and not few["warp_group_instructions"] and not few["faults"]


def test_fp32_products_and_kernels_without_products_need_no_matrix_units(toys):
    assert toys["single, sm_90"]["dots"] == 1 and toys["single, sm_90"]["half_dots"] == 0
    assert toys["single, sm_90"]["matrix_instructions"] == 0 and not toys["single, sm_90"]["faults"]
    assert toys["add, sm_90"]["dots"] == 0 and not toys["add, sm_90"]["faults"]
    assert 1 <= toys["add, sm_90"]["registers"] < 32


def test_registers_that_spill_are_found(toys):
    assert toys["one warp, sm_90"]["spill_bytes"] > 100
    assert "spills" in toys["one warp, sm_90"]["faults"][0]


def test_too_much_shared_memory_is_found(toys):
    assert toys["large, sm_90"]["shared_bytes"] > SHARED_LIMIT["sm_90"]
    assert any("shared memory" in fault for fault in toys["large, sm_90"]["faults"])


FINE = Binary("causal", "kernel", "sm_90", 4, 3, 128, 0, 1024, 8, 8, 1, 1, 0, 1, (1,), 1, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"off_matrix_units": 1}, "1 of 1 16-bit dots are off the matrix units"),
        ({"matrix_instructions": 0}, "no matrix instruction"),
        ({"warp_group_instructions": 0}, "no wgmma"),
        ({"warp_group_instructions": 0, "architecture": "sm_80"}, None),
        ({"warp_group_instructions": 0, "large_dots": 0}, None),
        ({"shared_bytes": SHARED_LIMIT["sm_90"]}, None),
        ({"shared_bytes": SHARED_LIMIT["sm_90"] + 1}, "of shared memory, there are 232448"),
        ({"shared_bytes": 1 << 17, "architecture": "gfx942"}, "of shared memory, there are 65536"),
    ],
)
def test_a_fault_is_said_in_words(change, says):
    faults = replace(FINE, **change).faults()
    assert faults == [] if says is None else says in faults[0]


def test_dots_are_counted_by_type_size_and_where_they_run():
    code = """
    %5 = tt.dot %1, %2, %3, inputPrecision = tf32 : tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>> * tensor<32x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma}>> -> tensor<64x64xf32, #mma>
    %6 = tt.dot %1, %2, %3 : tensor<16x32xf16, #ttg.dot_op<{opIdx = 0, parent = #blocked1}>> * tensor<32x64xf16, #ttg.dot_op<{opIdx = 1, parent = #blocked1}>> -> tensor<16x64xf32, #blocked1>
    %7 = tt.dot %1, %2, %3, inputPrecision = ieee : tensor<16x32xf32, #ttg.dot_op<{opIdx = 0, parent = #blocked}>> * tensor<32x64xf32, #ttg.dot_op<{opIdx = 1, parent = #blocked}>> -> tensor<16x64xf32, #blocked>
    %8 = ttng.warp_group_dot %1, %2, %3 : !ttg.memdesc<128x64xbf16, #shared, #smem> * !ttg.memdesc<64x64xbf16, #shared1, #smem> -> tensor<128x64xf32, #mma1>
    """  # noqa: E501
    assert Dots.of(code) == Dots(all=4, half=3, off_matrix_units=1, large=2)


# The table itself.


@pytest.mark.sampled(4)
@pytest.mark.parametrize("op", sorted({file.parent.name for file in OPS.glob("*/kernel*.py")}))
def test_kernels_keep_their_promises_on_hopper(op, tmp_path):
    """Every op in bf16, with every kind of decay."""
    found = check(tmp_path, "--quick", "--op", op, "--arch", "sm_90")
    assert {row["op"] for row in found} == {op}


@pytest.mark.nightly
def test_kernels_keep_their_promises_elsewhere(tmp_path):
    some = ("--op", "softmax_block", "--op", "diagonal_scan", "--arch", "sm_80", "--arch", "gfx942")
    assert {row["architecture"] for row in check(tmp_path, "--quick", *some)} == {"sm_80", "gfx942"}


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
@pytest.mark.parametrize("op", ["decayed_linear_attention", "delta_rule"])
def test_recurrences_keep_their_promises_elsewhere(op, architecture, tmp_path):
    check(tmp_path, "--quick", "--op", op, "--arch", architecture)


def check(folder, *options):
    out = folder / "kernels.json"
    done = run("-m", "bench.ops.kernels", "--out", str(out), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = from_json(out.read_text())
    assert rows and not any(row["faults"] for row in rows)
    return rows


# Recording, cases and rooflines need no compiler.


def test_launches_are_noted_down_and_the_door_is_put_back():
    from seqpar.ops import launch
    from tests.ops.toys import toy_kernels as toy

    door, architecture = launch.launch, launch.architecture

    (start,) = recorded(lambda: toy.matmul(torch.empty(128, 64), torch.empty(64, 64)), "sm_80")
    assert start.kernel is toy.matmul_kernel and start.grid == (2,) and start.options["num_warps"] == 4
    assert recorded(lambda: toy.add(torch.empty(0)), "sm_80") == []
    if launch.interpreted(toy.matmul_kernel):
        with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
            job(start, "sm_80")
    with pytest.raises(ZeroDivisionError):
        recorded(lambda: 1 / 0, "sm_80")
    assert (launch.launch, launch.architecture) == (door, architecture)


def test_every_op_with_kernels_is_in_the_table():
    with_kernels = {file.parent.name for file in OPS.glob("*/kernel*.py")}
    assert with_kernels <= set(BUILDERS)
    found = list(cases())
    assert {case.op for case in found} == with_kernels & set(BUILDERS)
    assert {case.op for case in found if case.quick} == {case.op for case in found}
    assert len({(case.op, case.name) for case in found}) == len(found)
    assert all(sum(case.op == op for case in found) >= 8 for op in with_kernels)


def test_rooflines_are_counted_from_shapes():
    # two chunks of 64 tokens, dims 16 and 32: scores and outputs of 32 pairs per token, two products of states
    work = roofline.linear(1, 128, 1, 16, 32, 2, gates="scalar")
    assert work.forward_flops == 2 * 128 * (32 * (16 + 32) + 2 * 16 * 32)
    assert work.forward_bytes == 2 * 128 * (16 + 16 + 32 + 32) + 4 * 128 + 2 * 2 * 4 * 16 * 32
    card = roofline.Card("slow", 1.0, 1e30)
    assert work.seconds(card) == work.forward_bytes and work.seconds(card, backward=True) == work.both_bytes
    assert work.seconds(roofline.Card("slow", 1e30, 2.0)) == work.forward_flops / 2
    causal = roofline.softmax(1, 100, 1, 8, 2, visible=50.5)
    assert causal.forward_flops == 4 * 100 * 50.5 * 8 and causal.both_flops == 3.5 * causal.forward_flops
    assert roofline.delta(1, 128, 1, 16, 16, 2).forward_flops > roofline.linear(1, 128, 1, 16, 16, 2).forward_flops
    assert roofline.diagonal(1, 64, 4, 16, 2).seconds(card) == 2 * 64 * (12 + 32) + 2 * 4 * 64


def test_the_table_says_what_is_wrong(capsys):
    good, bad = ({"op": "toy", **vars(FINE), "faults": faults} for faults in ([], ["spills 8 bytes per thread"]))
    show([good, bad])
    out = capsys.readouterr().out
    assert "kernel (causal, sm_90): spills 8 bytes per thread" in out and out.count("toy") == 2
    assert "| toy | sm_90 | 2 | 128 | 0 | 2 | 2 | 1 |" in markdown([good, bad])
    text = as_json([good, bad], [])
    found = from_json(text)
    assert found == [{**row, "grid": [1]} for row in (good, bad)] and from_json(text, "work") == []


def test_unknown_ops_and_architectures_are_refused(capsys):
    for words in (["--op", "nothing"], ["--arch", "sm_75"]):
        with pytest.raises(SystemExit):
            parser().parse_args(words)
    assert "sm_90" in capsys.readouterr().err
    assert main(["--case", "no case has this name"]) == 0
