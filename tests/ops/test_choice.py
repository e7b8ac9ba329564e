"""Which implementation runs: all that can be asked for, where kernels cannot run, and a compiler that is in doubt."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seqpar.ops import checks, choice, problems, selfcheck
from seqpar.ops.checks import CHECKS
from seqpar.ops.choice import IMPLEMENTATIONS, triton_version, trusted, use_kernel, verdict
from seqpar.ops.decayed_linear_attention import DecayedLinearAttention
from seqpar.ops.delta_rule import DeltaRule
from seqpar.ops.diagonal_scan import DiagonalScan, SelectiveScan
from seqpar.ops.recurrent_cell import selfcheck as recurrent_cell
from seqpar.verification import doctor

CUDA = torch.device("cuda", 0)


def small_error(device, dtype):
    return 1e-6


def on_cuda(dtype=torch.bfloat16, device=CUDA):
    """As much of a CUDA tensor as the choice looks at."""
    return SimpleNamespace(is_cuda=True, device=device, dtype=dtype)


@pytest.fixture
def machine(monkeypatch):
    """A machine with this Triton and a GPU of this architecture; nothing was checked on it yet."""
    choice._checked.cache_clear()

    def build(triton, architecture="sm_90"):
        monkeypatch.setattr(choice, "has_triton", lambda: bool(triton))
        monkeypatch.setattr(choice, "triton_version", lambda: triton)
        monkeypatch.setattr(choice.launch, "architecture", lambda x: architecture)

    yield build
    choice._checked.cache_clear()


class Check:
    """A self-check that finds ``error``, and counts how often it was asked."""

    def __init__(self, error):
        self.error, self.asked = error, []

    def __call__(self, device, dtype):
        self.asked.append((device, dtype))
        if isinstance(self.error, Exception):
            raise self.error
        return self.error


@pytest.mark.parametrize("impl", ["", "Triton", "kernel", None])
def test_an_unknown_implementation_is_refused_with_the_three_that_there_are(impl):
    with pytest.raises(ValueError, match="auto, reference, triton") as error:
        use_kernel(impl, torch.ones(1), check=small_error)
    assert repr(impl) in str(error.value)


def test_cpu_tensors_take_the_reference_unless_kernels_are_asked_for(machine):
    machine("3.7.1", "cpu")
    check = Check(1e-6)
    assert not use_kernel("auto", torch.ones(1), check=check)
    assert not use_kernel("reference", torch.ones(1), check=check)
    assert not check.asked


def test_kernels_on_cpu_tensors_need_the_interpreter(machine, monkeypatch):
    machine("3.7.1", "cpu")
    monkeypatch.setattr(choice, "kernels_are_interpreted", lambda: False)
    with pytest.raises(ValueError, match="need a CUDA device or Triton's interpreter"):
        use_kernel("triton", torch.ones(1), check=small_error)
    monkeypatch.setattr(choice, "kernels_are_interpreted", lambda: True)
    assert use_kernel("triton", torch.ones(1), check=small_error)


def test_without_triton_auto_takes_the_reference_and_kernels_are_refused(machine):
    machine("")
    assert not use_kernel("auto", on_cuda(), check=small_error)
    with pytest.raises(ValueError, match="not installed"):
        use_kernel("triton", on_cuda(), check=small_error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
def test_dtypes_that_kernels_do_not_have_take_the_reference(machine, dtype):
    machine("3.7.1")
    assert not use_kernel("auto", on_cuda(dtype), check=small_error)
    assert str(dtype) in verdict(on_cuda(dtype), small_error).why


@pytest.mark.parametrize(
    ("version", "architecture", "is_trusted"),
    [
        ("3.3.1", "sm_90", True),
        ("3.4.0", "sm_90", False),
        ("3.6.0", "sm_90", False),
        ("3.7.0", "sm_90", False),
        ("3.7.0+git0a1b2c", "sm_90", False),
        ("3.7.1", "sm_90", True),
        ("3.10.0", "sm_90", True),
        ("unreadable", "sm_90", False),
        ("3.6.0", "sm_80", True),
        ("3.6.0", "sm_100", True),
        ("3.6.0", "gfx942", True),
    ],
)
def test_only_some_versions_on_hopper_are_in_doubt(machine, version, architecture, is_trusted):
    machine(version, architecture)
    assert trusted(architecture) == is_trusted
    check = Check(1e-6)
    assert use_kernel("auto", on_cuda(), check=check)
    assert len(check.asked) == (0 if is_trusted else 1)


def test_a_check_is_made_once_per_device_and_dtype(machine):
    machine("3.6.0")
    check, other = Check(1e-6), torch.device("cuda", 1)
    for _ in range(3):
        for x in (on_cuda(), on_cuda(torch.float32), on_cuda(device=other)):
            assert use_kernel("auto", x, check=check)
    assert check.asked == [(CUDA, torch.bfloat16), (CUDA, torch.float32), (other, torch.bfloat16)]


@pytest.mark.parametrize("error", [0.54, float("nan"), float("inf"), RuntimeError("the compiler fell over")])
def test_a_failed_check_warns_once_and_the_reference_runs(machine, error):
    machine("3.6.0")
    check = Check(error)
    with pytest.warns(UserWarning, match=r"self-check with triton 3\.6\.0 .* failed.*the reference runs"):
        assert not use_kernel("auto", on_cuda(), check=check)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_kernel("auto", on_cuda(), check=check)
    assert len(check.asked) == 1
    assert "failed" in verdict(on_cuda(), check).why


def test_kernels_that_were_asked_for_run_unchecked(machine):
    machine("3.6.0")
    check = Check(0.54)
    assert use_kernel("triton", on_cuda(), check=check)
    assert not check.asked


def test_the_installed_triton_has_a_version():
    pytest.importorskip("triton")
    assert choice.has_triton() and triton_version()[0].isdigit()
    assert IMPLEMENTATIONS[0] == "auto"


def test_whether_kernels_are_interpreted_is_what_the_kernels_say(monkeypatch):
    kernel = pytest.importorskip("seqpar.ops.decayed_linear_attention.kernel")
    functions = [value for value in vars(kernel).values() if type(value).__name__ == "InterpretedFunction"]
    assert choice.kernels_are_interpreted() == bool(functions)
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    assert not choice.kernels_are_interpreted()


# What doctor says.


def says(found):
    return {item.name: item for item in found}


def test_doctor_says_which_ops_run_their_kernels(machine, monkeypatch):
    machine("3.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: on_cuda(dtype))
    monkeypatch.setattr(checks, "CHECKS", {"right": Check(1e-6), "wrong": Check(0.54)})
    with pytest.warns(UserWarning, match="the reference runs"):
        found = says(doctor._kernels())
    assert found["triton"].found == "3.6.0"
    assert found["right"].state == "found" and "kernels run: self-check" in found["right"].found
    assert found["wrong"].state == "unfit" and "the reference runs: self-check" in found["wrong"].found
    assert "5.4e-01" in found["wrong"].found and found["wrong"].used_for


def test_doctor_checks_nothing_without_a_gpu_or_without_triton(machine, monkeypatch):
    for version, state in (("3.7.1", "found"), ("", "missing")):
        machine(version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert {name: item.state for name, item in says(doctor._kernels()).items()} == {"triton": state}


# The self-checks.


def test_a_self_check_compares_all_results_of_all_stages(monkeypatch):
    """With reference against reference nothing differs in fp64, and any one result that is wrong is seen."""
    problem = next(problems.delta(DeltaRule, 16, tokens=20))
    same = replace(problem, build=lambda impl: problem.build("reference"))
    assert selfcheck.max_error(same, torch.device("cpu"), torch.float64) == 0
    assert 0 < selfcheck.max_error(same, torch.device("cpu"), torch.float32) < 1e-5
    found, expected = selfcheck.both(same, torch.device("cpu"), torch.float32)
    assert len(found) == len(expected) == 8
    results = selfcheck.results
    for broken in range(7):
        if found[broken] is None:
            continue

        def wrong(op, tokens, *rest, broken=broken):
            given = results(op, tokens, *rest)
            if tokens[0].dtype == torch.float32:
                given[broken] = given[broken] * 1.5
            return given

        monkeypatch.setattr(selfcheck, "results", wrong)
        assert selfcheck.max_error(same, torch.device("cpu"), torch.float32) == pytest.approx(0.5, rel=1e-3)


def test_a_self_check_never_loses_what_is_not_a_number():
    one, none = torch.ones(2), torch.full((2,), float("nan"))
    assert selfcheck.relative_error(one, one) == selfcheck.relative_error(None, None) == 0
    assert not selfcheck.relative_error(none, one) <= 0.1
    assert selfcheck.relative_error(one, None) == float("inf")
    found = [Check(1e-6)(None, None), float("nan"), 1e-6]
    assert torch.tensor(found).max().isnan()


def test_gates_keep_fp32_and_inputs_take_the_dtype_under_test():
    for problem in (
        *problems.decayed(DecayedLinearAttention, 16, 20),
        *problems.delta(DeltaRule, 16, 20),
        *problems.scans(DiagonalScan, SelectiveScan, 16, 20),
    ):
        low = selfcheck.placed(problem.tokens, torch.device("cpu"), torch.bfloat16)
        kept = {torch.float64: torch.bfloat16, torch.float32: torch.float32}
        assert all(x is y or y.dtype == kept[x.dtype] for x, y in zip(problem.tokens, low, strict=True))
        wide = selfcheck.placed(problem.tokens, torch.device("cpu"), torch.float64)
        assert {x.dtype for x in wide if x is not None} == {torch.float64}
        assert all(start < 20 for start in problem.starts)


def test_every_op_with_kernels_and_stages_has_a_self_check():
    ops = Path(choice.__file__).parent
    with_kernels = {file.parent.name for file in ops.glob("*/kernel*.py")} - {"softmax_block"}
    assert with_kernels <= set(CHECKS)


@pytest.mark.sampled(6)
@pytest.mark.newest
@pytest.mark.parametrize("op", [op for op in CHECKS if op != "softmax_block" or torch.cuda.is_available()])
def test_kernels_pass_their_self_check(op, monkeypatch):
    """In the interpreter, which shows that the check itself runs; on a GPU, that the compiler is right."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":  # the interpreter takes its time
        small = {name: getattr(problems, name) for name in ("decayed", "delta", "scans")}
        for name, build in small.items():
            monkeypatch.setattr(problems, name, lambda *given, build=build: build(*given[:-1], 16, tokens=20))
        monkeypatch.setattr(recurrent_cell, "DIMS", (16,))
        monkeypatch.setattr(recurrent_cell, "SIZES", (3, 4, 1))
    assert CHECKS[op](device, torch.float32) <= choice.LARGEST_ERROR[torch.float32]
