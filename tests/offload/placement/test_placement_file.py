"""Placement files: the columns by name, and one clear line for whatever is wrong."""

import pytest

from seqpar.offload.placement.buffers import Buffer
from seqpar.offload.placement.placement_file import read_placement_file


@pytest.fixture
def write(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "problem.csv"
        path.write_bytes(text.encode(encoding))
        return path

    return write


def test_a_file_is_read(write):
    path = write("id,lower,upper,size\nb1,0,3,4\nb2,-3,9,0\n")
    assert read_placement_file(path) == (Buffer("b1", 4, 0, 3), Buffer("b2", 0, -3, 9))


@pytest.mark.parametrize(
    "text",
    [
        "size,id,upper,note,lower\n4,b1,3,hello,0\n",
        " id , lower ,upper, size\r\nb1, 0, 3 ,4\r\n\r\n",
        "\ufeffid,lower,upper,size\nb1,0,3,4",
        'id,lower,upper,size\n"b1",0,"3",4\n , , , \n',
    ],
    ids=["columns in any order", "blanks and empty lines", "byte order mark", "quotes"],
)
def test_it_is_read_with_patience(write, text):
    assert read_placement_file(write(text)) == (Buffer("b1", 4, 0, 3),)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", r"problem\.csv: empty; expected a line id,lower,upper,size"),
        ("\n", r"problem\.csv: empty"),
        ("id,lower,upper,size\n", r"problem\.csv: no buffers"),
        ("id,lower,size\nb1,0,4\n", r"problem\.csv:1: no column upper"),
        ("b1,0,3,4\nb2,3,9,4\n", r"problem\.csv:1: no column id, lower, upper, size"),
        ("id,lower,upper,size\nb1,0,3\n", r"problem\.csv:2: 3 values, expected 4"),
        ("id,lower,upper,size\nb1,0,3,4\nb2,3,3,4\n", r"problem\.csv:3: buffer b2: upper 3 is not above lower 3"),
        ("id,lower,upper,size\nb1,5,3,4\n", r"problem\.csv:2: buffer b1: upper 3 is not above lower 5"),
        ("id,lower,upper,size\nb1,0,3,-4\n", r"problem\.csv:2: buffer b1: size -4"),
        ("id,lower,upper,size\nb1,0,3,4.5\n", r"problem\.csv:2: size is '4\.5'; expected a whole number"),
        ("id,lower,upper,size\nb1,zero,3,4\n", r"problem\.csv:2: lower is 'zero'"),
        ("id,lower,upper,size\nb1,0,,4\n", r"problem\.csv:2: upper is ''"),
        ("id,lower,upper,size\nb1,0,3,1e3\n", r"problem\.csv:2: size is '1e3'"),
        ("id,lower,upper,size\nb1,0,3,٣\n", r"problem\.csv:2: size is '٣'"),
        ("id,lower,upper,size\nb1,0,3,9999999999999999999\n", r"at most 18 digits"),
        ("id,lower,upper,size\n,0,3,4\n", r"problem\.csv:2: no id"),
        ("id,lower,upper,size\nb1,0,3,4\nb1,5,6,4\n", r"problem\.csv:3: buffer b1 comes twice"),
        ('id,lower,upper,size\n"b1,0,3,4\n', r"problem\.csv: unexpected end of data"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(write, text, why):
    with pytest.raises(ValueError, match=why):
        read_placement_file(write(text))


def test_a_file_that_is_not_there_or_not_text(tmp_path, write):
    with pytest.raises(ValueError, match=r"none\.csv: cannot read: No such file"):
        read_placement_file(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="cannot read: Is a directory"):
        read_placement_file(tmp_path)
    with pytest.raises(ValueError, match="not a text file"):
        read_placement_file(write("id,lower,upper,size\nbé,0,3,4\n", encoding="latin-1"))
