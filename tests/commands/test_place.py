"""``seqpar place``: a table or JSON, a picture, and one line for whatever is wrong."""

import json

import pytest

from seqpar.commands.main import main as command
from seqpar.offload.placement import placement_file
from seqpar.offload.placement.buffers import Placement
from seqpar.offload.placement.check_placement import check_placement
from tests.offload.placement.placements import endless, planted


def main(words):
    """``seqpar place`` with these arguments."""
    return command(["place", *words])


LINES = "id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\nb3,0,9,4\nb4,9,21,4\nb5,0,21,4\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "input.csv"
    path.write_text(LINES)
    return path


def save(tmp_path, buffers, name="planted.csv"):
    path = tmp_path / name
    rows = [f"{buffer.id},{buffer.birth},{buffer.death},{buffer.size}" for buffer in buffers]
    path.write_text("\n".join(["id,lower,upper,size", *rows]))
    return path


def test_json_has_peak_bound_status_offsets_and_seconds(file, capsys):
    assert main([str(file), "--capacity", "12", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["peak"], found["lower_bound"], found["status"]) == (12, 12, "optimal")
    assert set(found["offsets"]) == {"b1", "b2", "b3", "b4", "b5"}
    assert found["seconds"] >= 0 and found["note"] == ""
    assert captured.err == ""


def test_json_is_a_placement(tmp_path, capsys):
    buffers = planted(6, 40)
    assert main([str(save(tmp_path, buffers)), "--json", "--seconds", "30"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = ("offsets", "peak", "lower_bound", "status", "stage", "seconds")
    check_placement(buffers, Placement(*(found[key] for key in keys)), 1 << 20)


def test_the_table_says_how_good_it_is(file, capsys):
    assert main([str(file), "--capacity", "16"]) == 0
    text = capsys.readouterr().out
    for word in ("input.csv", "5 buffers", "lower bound", "optimal: certified", "fits", "greedy"):
        assert word in text


def test_a_placement_above_the_capacity_is_status_1(tmp_path, capsys):
    path = save(tmp_path, endless())
    assert main([str(path), "--capacity", str(1 << 20), "--seconds", "0.1"]) == 1
    text = capsys.readouterr().out
    assert "no placement within it was found" in text and "above the lower bound" in text


@pytest.mark.parametrize(
    ("text", "arguments", "why"),
    [
        (LINES, ["--capacity", "11"], "12 bytes live at event 0, more than the capacity 11"),
        (LINES, ["--capacity", "3"], "buffer b1 has 4 bytes, more than the capacity 3"),
        (LINES, ["--capacity", "none"], "expected a whole number of at least 1, got 'none'"),
        (LINES, ["--capacity", "0"], "expected a whole number of at least 1"),
        (LINES, ["--seconds", "0"], "expected seconds above 0"),
        (LINES, ["--seconds", "nan"], "expected seconds above 0"),
        (LINES, ["--plot", "picture.pdf"], "ends in .svg or .png"),
        (LINES, ["--plot", "/no/such/folder/picture.svg"], "cannot write /no/such/folder/picture.svg: No such file"),
        ("id,lower,upper\na,0,1\n", [], "no column size"),
        ("id,lower,upper,size\na,0,1,1\na,2,3,1\n", [], "buffer a comes twice"),
        ("id,lower,upper,size\na,1,1,1\n", [], "upper 1 is not above lower 1"),
        ("id,lower,upper,size\na,0,1,-1\n", [], "size -1"),
        ("id,lower,upper,size\na,0,1,x\n", [], "size is 'x'"),
        ("", [], "empty"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, text, arguments, why):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    try:
        status = main([str(path), *arguments])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith("seqpar place: ") and captured.err.count("\n") == 1
    assert why in captured.err


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.csv")]) == 2
    assert "cannot read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_picture_is_drawn(file, tmp_path, capsys, suffix):
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    for picture in pictures:
        assert main([str(file), "--capacity", "12", "--plot", str(picture), "--json"]) == 0
    one, two = (picture.read_bytes() for picture in pictures)
    assert one == two and len(one) > 1000
    if suffix == "svg":
        assert b"peak 12 bytes" in one or b"<svg" in one


@pytest.mark.parametrize(
    "rows",
    [
        ["a,0,2,999999999999999999"] * 5,
        ["a,0,9,900000000000000000"] * 6,
        ["a,0,2,1" + "0" * 18],
        ["a,0,2," + "9" * 400],
        ["a,0," + "9" * 100_000 + ",1"],
    ],
)
def test_sizes_near_the_end_of_integers_are_one_short_line(tmp_path, capsys, rows):
    path = tmp_path / "large.csv"
    path.write_text("\n".join(["id,lower,upper,size", *(f"{i}{row}" for i, row in enumerate(rows))]))
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 300, said
    assert "bytes in all; expected less than" in said or "at most 18 digits" in said


def test_the_largest_that_are_allowed_are_placed(tmp_path, capsys):
    path = tmp_path / "large.csv"
    rows = [f"b{i},{i - 10**17},{10**18 - 9 + i},{10**18 - 1}" for i in range(4)]
    path.write_text("\n".join(["id,lower,upper,size", *rows]))
    assert main([str(path), "--json", "--seconds", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["peak"] == 4 * (10**18 - 1)


def test_a_file_without_end_is_read_to_the_limit_and_refused(capsys, monkeypatch):
    monkeypatch.setattr(placement_file, "MOST_BYTES", 10_000)
    assert main(["/dev/zero"]) == 2
    assert "/dev/zero: larger than 0 MiB" in capsys.readouterr().err
