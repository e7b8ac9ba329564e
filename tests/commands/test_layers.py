"""``seqpar layers``: the catalog as a table, as JSON and in the README; the price of a pattern for the planner."""

import json
from pathlib import Path

import pytest

from seqpar.commands.layers import markdown
from seqpar.commands.main import main
from seqpar.estimates.pricing import decoder_shape
from seqpar.layers.catalog import CATALOG, find
from seqpar.planner import analytic_cluster, analytic_costs, read_costs

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_table_has_every_row(capsys):
    assert main(["layers"]) == 0
    shown = capsys.readouterr().out
    assert all(entry.layer in shown for entry in CATALOG.values())


def test_json_has_what_other_programs_need(capsys):
    assert main(["layers", "--json", "--dim", "64", "--heads", "4", "--tokens", "128"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(CATALOG)
    assert {"name", "paper", "crosses", "bytes_per_cut", "transports", "status"} <= set(rows["gla"])
    assert rows["linear_attention"]["bytes_per_cut"] == 4 * 4 * 16 * 16
    assert rows["softmax"]["bytes_per_cut"] == 4 * 128 * 2 * 64
    assert rows["softmax"]["transports"] == ["ring", "all_gather", "all_to_all"]


def test_the_readme_has_the_catalog_as_it_is():
    assert markdown(list(CATALOG.values())) in README, "run: seqpar layers --markdown, and put it into README.md"


def test_a_pattern_is_priced_by_what_its_rows_send():
    shape = decoder_shape("gla linear_attention softmax", 2, 64, 4, 128, 1000)
    gla, linear = 4 * 4 * 8 * 16, 4 * 4 * 16 * 16
    assert (shape.layers, shape.softmax_layers, shape.sent_bytes) == (6, 2, 2 * (gla + linear))


@pytest.mark.parametrize("name", [entry.name for entry in CATALOG.values() if entry.status == "works"])
def test_the_planner_prices_every_row(name):
    """More heads of the same width, or a wider model, never send less; costs are those of a valid model."""
    cluster = analytic_cluster(8, "H100-80G")
    shapes = [decoder_shape(name, 4, dim, 16, 4 * dim, 1000) for dim in (512, 1024)]
    for shape in shapes:
        costs = analytic_costs(name, shape, "H100-80G", cluster)
        assert all(kind.linear_seconds > 0 for kind in costs.kinds)
    assert shapes[1].sent_bytes >= shapes[0].sent_bytes >= 0


def test_a_price_is_a_cost_model_for_seqpar_plan(tmp_path, capsys):
    out = tmp_path / "costs.json"
    assert main(["layers", "--pattern", "mamba2 softmax", "--devices", "8", "--costs", str(out)]) == 0
    assert f"seqpar plan --model {out}" in capsys.readouterr().out
    costs, cluster = read_costs(str(out))
    assert costs.name == "mamba2 softmax" and cluster.devices == 8
    (tmp_path / "lengths.txt").write_text("4000\n3000\n100\n")
    assert main(["plan", "--lengths", str(tmp_path / "lengths.txt"), "--model", str(out)]) == 0


WRONG = {
    "no such layer": (
        ["--pattern", "gla perceiver", "--costs", "x.json"],
        "there is no layer 'perceiver'; the catalog",
    ),
    "pattern alone": (["--pattern", "gla"], "--pattern and --costs go together"),
    "heads": (["--dim", "10", "--heads", "4"], "--heads 4 must divide --dim 10"),
    "no such GPU": (["--pattern", "gla", "--gpu", "X1", "--costs", "x.json"], "no GPU 'X1'; known are"),
    "no such folder": (["--pattern", "gla", "--costs", "/nowhere/at/all.json"], "cannot write /nowhere/at/all.json"),
    "empty": (["--pattern", " ", "--costs", "x.json"], "at least one layer"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_bad_input_is_one_line(fault, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, words = WRONG[fault]
    assert main(["layers", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_finding_a_row_names_all_of_them():
    with pytest.raises(ValueError, match="the catalog has softmax, linear_attention"):
        find("softmaxx")


def test_the_table_fits_100_columns_with_two_lines_a_row(capsys):
    assert main(["layers"]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert max(map(len, lines)) <= 100
    starts = [number for number, line in enumerate(lines[1:-3], start=1) if not line.startswith(" ")]
    assert [lines[number].split()[0] for number in starts] == list(CATALOG)
    assert starts == list(range(1, 2 * len(CATALOG), 2)), "one line of names and bytes, one of what crosses"
    for entry, number in zip(CATALOG.values(), starts):
        said = (entry.crosses if entry.status == "works" else entry.status).split(" (")[0]
        assert lines[number + 1].strip(" ()").startswith(said.split(" before")[0])


def test_sizes_as_large_as_arguments_allow_are_no_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    most = "9" * 18
    assert main(["layers", "--tokens", most]) == 0
    assert main(["layers", "--pattern", "gla", "--costs", "x.json", "--repeats", most]) == 2
    assert "--repeats" in capsys.readouterr().err
    assert main(["layers", "--pattern", "gla", "--costs", "x.json", "--devices", "9" * 17 + "2"]) == 0
