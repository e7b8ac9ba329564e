"""``seqpar models``: the list of measured models as a table, as JSON and in the docs; no transformers is needed."""

import json
import subprocess
import sys
from pathlib import Path

from seqpar.commands.main import main
from seqpar.commands.models import markdown
from seqpar.hf.measured import measured

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_table_fits_and_has_every_row(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(measured())]] == list(measured())
    assert max(map(len, lines)) <= 100


def test_json_has_what_other_programs_need(capsys):
    assert main(["models", "--json", "llama"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row) == {"model_type", "in_place", "converted", "error", "why"}
    assert (row["model_type"], row["in_place"], row["converted"]) == ("llama", "exact", "exact")
    assert row["error"] <= 1e-9


def test_a_name_that_is_not_there_is_said(capsys):
    assert main(["models", "llam"]) == 2
    assert "did you mean 'llama'" in capsys.readouterr().err


def test_the_docs_have_the_list_as_it_is():
    assert markdown(list(measured().values())) in DOCS.read_text(), "run: seqpar models --markdown, and put it there"


def test_no_torch_is_loaded():
    code = "import sys; from seqpar.commands.main import main; main(['models']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
