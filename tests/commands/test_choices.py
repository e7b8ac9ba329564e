"""What commands offer is what the library has, and ``--help`` says it without loading the library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar.collectives.scan import ALGORITHMS
from seqpar.commands import choices
from seqpar.commands.main import COMMANDS
from seqpar.crossing.attention import TRANSPORTS
from seqpar.models.hybrid import MIXERS
from seqpar.offload.planning import decoders
from seqpar.planner import published_models
from seqpar.planner.problem.models import DECODERS, GPUS
from seqpar.sharding.shard import LAYOUTS

ROOT = Path(__file__).parents[2]
MOST_MODULES = 220  # those of Python and argparse are about 150; numpy alone is 120 more
HELP = """
import contextlib, io, json, sys
from seqpar.commands.main import main
page = io.StringIO()
with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
    main([*sys.argv[1:], "--help"])
print(json.dumps([page.getvalue(), sorted(sys.modules)]))
"""


def test_choices_are_those_of_the_library():
    assert tuple(LAYOUTS) == choices.LAYOUTS
    assert tuple(TRANSPORTS) == choices.TRANSPORTS
    assert tuple(ALGORITHMS) == choices.SCANS
    assert tuple(MIXERS) == choices.MIXERS
    assert published_models() == choices.MEASURED
    assert tuple(each.name for each in decoders.DECODERS) == choices.DECODERS
    assert (*choices.DECODERS, *choices.PASSING_ON) == tuple(DECODERS)
    bandwidths = {name: (gpu.node_bytes_per_second / 1e9, gpu.network_bytes_per_second * 8 / 1e9)
                  for name, gpu in GPUS.items()}  # fmt: skip
    assert dict(choices.GPUS) == bandwidths and list(choices.GPUS) == list(GPUS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_starts_without_torch_and_with_little_else(command):
    words = [sys.executable, "-c", HELP, *([command] if command else [])]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    page, modules = json.loads(run.stdout)
    assert page.startswith(f"usage: seqpar {command}".rstrip())
    heavy = {"torch", "numpy", "rich", "pulp", "highspy", "matplotlib", "seqpar.planner", "seqpar.offload"}
    assert not heavy & set(modules)
    assert len(modules) <= MOST_MODULES, len(modules)


def test_every_name_is_in_the_help():
    run = subprocess.run(
        [sys.executable, "-m", "seqpar", "plan", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = " ".join(run.stdout.replace("-\n", "-").split()).replace("- ", "-")
    assert all(name in page for name in (*DECODERS, *published_models()))
    assert "H100-80G 450 and 400" in page
