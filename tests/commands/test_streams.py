"""Standard output as a pipe sees it: JSON and nothing else, and an orderly end when it is gone or SIGINT comes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEQPAR = [sys.executable, "-m", "seqpar"]
LENGTHS = "48000\n48000\n100000\n48000\n48000\n"
BUFFERS = "id,lower,upper,size\n" + "".join(f"b{i},{i % 7},{i % 7 + 3 + i % 5},{9 + i * 5 % 11}\n" for i in range(24))
JSON = {
    "plan": ["--lengths", "lengths.txt", "--model", "gpt-7b-384k", "--cluster", "64xA100-40G"],
    "place": ["buffers.csv"],
    "memory": ["--model", "llama-8b", "--tokens", "256K"],
    "layers": [],
    "doctor": [],
    "verify": ["--ranks", "2", "--tokens", "20"],
    "calibrate": ["--ranks", "2", "--tokens", "16,32,64", "--repeats", "1"],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "lengths.txt").write_text(LENGTHS)
    (tmp_path / "buffers.csv").write_text(BUFFERS)
    return tmp_path


def run(words, folder, stdout=subprocess.PIPE):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=110
    )


def run_toy(body, folder, **where):
    """A process whose command is ``body``."""
    lines = ["import os, signal, sys, time", "from seqpar.commands.streams import run_main", "def main():"]
    lines += [f"    {line}" for line in body.splitlines()] + ["sys.exit(run_main(main))"]
    return run([sys.executable, "-c", "\n".join(lines)], folder, **where)


@pytest.mark.newest
@pytest.mark.parametrize("command", JSON)
def test_json_is_all_that_reaches_standard_output(command, folder):
    ended = run([*SEQPAR, command, *JSON[command], "--json"], folder)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)
    assert "HiGHS" not in ended.stderr


PROGRAMS = """
from seqpar.planner.bounds import lp
from seqpar.planner.exact import solver
program = solver.Program()
columns = [program.variable(-3.0, 0.0, 1.0, True) for _ in range(3)]
program.row(-solver.INFINITY, 4.0, dict(zip(columns, (2.0, 3.0, 2.0))))
assert solver.solve(program, None, solver.Limits(100, 20.0)).optimal
relaxed = lp.LinearProgram()
x = relaxed.columns(2, 1.0)
relaxed.row(3.0, 9.0, (x, 1.0))
assert relaxed.solve() == 3.0

from seqpar.offload.planning import linear_program
from seqpar.offload.placement.bilevel import place_by_mip
from seqpar.offload.placement.buffers import Buffer
linear = linear_program.LinearProgram()
linear.variable(-1.0, 0.0, 2.0)
assert linear_program.solve(linear) == (2.0,)
place_by_mip([Buffer(f"b{i}", 5 + i * 3 % 7, i % 4, i % 4 + 2 + i % 3) for i in range(9)], 20.0)
"""


@pytest.mark.newest
def test_solvers_print_nothing_in_a_program_of_the_users_own(folder):
    """No command stands around them here: ``swap="auto"`` and ``plan_batch`` are called by scripts."""
    pytest.importorskip("highspy")
    ended = run([sys.executable, "-c", PROGRAMS], folder)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_what_libraries_print_past_python_goes_to_standard_error(folder):
    ended = run_toy("os.write(1, b'banner\\n'); print('{}'); os.system('echo child')\nreturn 3", folder)
    assert (ended.returncode, ended.stdout) == (3, "{}\n")
    assert sorted(ended.stderr.split()) == ["banner", "child"]


@pytest.mark.parametrize("words", [["plan", *JSON["plan"]], ["plan", *JSON["plan"], "--json"], ["layers"], ["--help"]])
@pytest.mark.parametrize("kind", ["reader gone", "full"])
def test_output_that_nobody_takes(words, kind, folder):
    if kind == "full":
        with open("/dev/full", "w") as full:
            ended = run([*SEQPAR, *words], folder, stdout=full)
        assert (ended.returncode, ended.stderr) == (
            2,
            "seqpar: cannot write to standard output: No space left on device\n",
        )
        return
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        ended = run([*SEQPAR, *words], folder, stdout=gone)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_reader_that_has_seen_enough(folder):
    """``| head -c 1`` of more than a pipe holds."""
    code = (
        "import sys; from seqpar.commands.streams import run_main; sys.exit(run_main(lambda: print('x' * 10**7) or 0))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141


@pytest.mark.parametrize("command", [["plan", "--lengths", "pipe", *JSON["plan"][2:]], ["place", "pipe"]])
def test_an_interrupt_is_one_line(command, folder):
    os.mkfifo(folder / "pipe")
    with subprocess.Popen(
        [*SEQPAR, *command], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process, open(folder / "pipe", "w"):  # opens when the command reads  # fmt: skip
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (130, "", "seqpar: interrupted\n")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("print('kept')\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)", 130),
        ("print('kept')\nsys.exit(5)", 5),
        ("print('kept')\nraise OSError(28, 'of another file')", 1),
    ],
)
def test_what_was_printed_before_the_end_is_there(body, status, folder):
    ended = run_toy(body, folder)
    assert (ended.returncode, ended.stdout) == (status, "kept\n")
    assert ("Traceback" in ended.stderr) == (status == 1)


@pytest.mark.parametrize("closed", ["1", "2", "1,2"])
def test_streams_that_are_closed_are_no_fault(closed, folder):
    code = "import sys; from seqpar.commands.streams import run_main; sys.exit(run_main(lambda: print('said') or 4))"
    shut = " ".join(f"{number}>&-" for number in closed.split(","))
    shell = ["sh", "-c", f'exec "$0" -c "$1" {shut}', sys.executable, code]
    ended = run(shell, folder)
    assert ended.returncode == 4, ended.stderr
    assert ended.stdout == ("said\n" if closed == "2" else "")


def test_a_locale_without_bars_is_no_fault(folder):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["env", *(f"{name}={value}" for name, value in environment.items())]
    ended = run([*words, *SEQPAR, "plan", *JSON["plan"]], folder)
    assert ended.returncode == 0 and ended.stderr == "" and "micro-batch 0" in ended.stdout
