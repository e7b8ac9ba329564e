"""Documents from files: what is in them, in the order of their names, and one line for what cannot be read."""

import json
import random
import struct

import numpy as np
import pytest

from seqpar.training.documents import Documents, Packing, open_source, open_tokenizer, write_tokens
from seqpar.training.documents.texts import Lines
from tests.training.documents.test_stream import Numbers, drawn

TEXTS = ["one two", "", "zwei, drei: äöü €", "x" * 300, "\u2028 a line\x85", '"quoted" \\ {}']


def all_of(source):
    return [source.tokens(d, 0, source.length(d)).tolist() for d in range(len(source))]


def encoded(texts):
    return [list(text.encode()) for text in texts]


def write_lines(path, values, ends="\n", last=True, field="text"):
    lines = [json.dumps({"id": n, field: value}, ensure_ascii=n % 2 == 0) for n, value in enumerate(values)]
    path.write_bytes((ends.join(lines) + ends * last).encode())
    return path


def test_every_file_below_a_folder_is_a_document(tmp_path):
    for name, text in (("b.txt", "second"), ("a/z.md", "first €"), (".hidden/c", "no"), ("c", "third")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    source = open_source([tmp_path, tmp_path / "c"])
    assert all_of(source) == encoded(["first €", "second", "third"])
    middle = source.tokens(0, 7, 9).tolist()
    assert middle == list("first €".encode())[7:9], "a part that begins within a character"


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("last", [True, False])
def test_json_lines(tmp_path, ends, last):
    path = write_lines(tmp_path / "a.jsonl", TEXTS, ends, last)
    assert all_of(open_source([path])) == encoded(TEXTS)
    (tmp_path / "b.jsonl").write_bytes(b"")
    write_lines(tmp_path / "c.ndjson", [[3, 70000, 5], []], field="text")
    (tmp_path / "README.md").write_text("is no document beside these")
    assert all_of(open_source([tmp_path])) == [*encoded(TEXTS), [3, 70000, 5], []]


def test_lines_are_found_wherever_they_are_cut_for_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("seqpar.training.documents.texts._SCANNED", 7)
    path = write_lines(tmp_path / "a.jsonl", TEXTS, "\n\n")
    assert [Lines(path, "text").text(d) for d in range(len(TEXTS))] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl, document 2 \(byte 14\): no JSON"),
        ("a.jsonl", b'{"content": "a"}\n', r"expected an object with 'text', got 'content'"),
        ("a.jsonl", b"[1]\n", "expected an object with 'text', got a list"),
        ("a.jsonl", b'{"text": 3}\n', "'text' must be a text or a list of tokens, got a int"),
        ("a.jsonl", b'{"text": [-1]}\n', "'text' must be a text or a list of tokens"),
        ("a.jsonl", b'{"text": "\xff"}\n', "is not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "holds half a character"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "no JSON"),
        ("a.txt", b"abc\xe2\x28\xa1", r"a.txt: is not UTF-8 at byte 3 \(0xe2\)"),
        ("a.txt", b"abc\xe2\x82", r"a.txt: is not UTF-8 at byte 3"),
        ("a.tokens", b"short", "is no file of tokens"),
        ("a.idx", b"short", "is no index of Megatron's"),
        ("a.jsonl", b"", "no documents in 1 files"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(Documents(open_source([tmp_path / name]), Packing(64), epochs=1))
    assert "\n" not in str(caught.value)


def test_paths_that_are_not_there_and_files_that_became_shorter(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        open_source([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no documents in 0 files"):
        open_source([tmp_path])
    (tmp_path / "a").write_bytes(b"0123456789")
    source = open_source([tmp_path])
    (tmp_path / "a").write_bytes(b"01234")
    with pytest.raises(ValueError, match="is shorter than it was"):
        source.tokens(0, 0, 10)


# Token files.


@pytest.mark.parametrize("first", [0, 70_000])
def test_a_token_file_holds_what_was_written_and_knows_lengths_without_reading(tmp_path, first):
    source = drawn(3)
    plain = source.tokens
    source.tokens = lambda document, start, stop: plain(document, start, stop) + first
    assert write_tokens(source, tmp_path / "a.tokens") == sum(source.lengths)
    found = open_source([tmp_path / "a.tokens"])
    assert [found.length(d) for d in range(len(found))] == source.lengths
    whole = [plain(d, 0, n).tolist() if n else [] for d, n in enumerate(source.lengths)]
    assert all_of(found) == [[token + first for token in each] for each in whole]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tokens"]


def test_a_token_file_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="cannot write"):
        write_tokens(drawn(3), tmp_path / "no" / "a.tokens")
    source = Numbers([3, 4])
    source.tokens = lambda document, start, stop: np.array([1 / document])
    with pytest.raises(ZeroDivisionError):
        write_tokens(source, tmp_path / "a.tokens")
    assert not list(tmp_path.iterdir())


def test_damaged_token_files_are_refused(tmp_path):
    path = tmp_path / "a.tokens"
    write_tokens(drawn(3), path)
    good = path.read_bytes()
    for bad in (good[:-1], good + b"\0", good[:20], good[:8] + b"\x03" + good[9:], good[:-8] + b"\xff" * 8):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"is not whole|do not fit|no file of tokens"):
            open_source([path])


@pytest.mark.parametrize(("kind", "dtype"), [(8, "<u2"), (4, "<i4")])
def test_megatrons_files(tmp_path, kind, dtype):
    documents = [[1, 2, 3], [], [40_000 if kind == 8 else 100_000]]
    lengths = np.array([len(each) for each in documents], "<i4")
    sizes = lengths.astype("<i8") * np.dtype(dtype).itemsize
    starts = (np.cumsum(sizes) - sizes).astype("<i8").tobytes()
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, kind, 3, 4)
    (tmp_path / "a.idx").write_bytes(head + lengths.tobytes() + starts + np.arange(4, dtype="<i8").tobytes())
    (tmp_path / "a.bin").write_bytes(b"".join(np.array(each, dtype).tobytes() for each in documents))
    assert all_of(open_source([tmp_path])) == documents
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="must hold 4 tokens"):
        open_source([tmp_path])


# Tokenizers.


@pytest.fixture
def words(tmp_path):
    library = pytest.importorskip("tokenizers")
    model = library.models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?")
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.post_processor = library.processors.TemplateProcessing(single="? $A", special_tokens=[("?", 2)])
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizer_from_a_file_makes_tokens_without_special_ones_and_an_end_is_put_behind(words):
    tokenizer = open_tokenizer(words)
    path = write_lines(words / "a.jsonl", ["one two one", "three", ""])
    assert tokenizer.vocabulary == 3
    assert all_of(open_source([path], tokenizer=tokenizer, end=7)) == [[0, 1, 0, 7], [2, 7], [7]]
    assert all_of(open_source([path], end=256))[2] == [256], "bytes, and one token more"


def test_a_file_that_is_no_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        open_tokenizer(tmp_path / "missing.json")


def test_a_text_is_tokenized_once_in_an_epoch_whatever_packing_asks(words):
    path = write_lines(words / "a.jsonl", ["one two " * random.Random(n).randint(1, 20) for n in range(40)])
    tokenizer, calls = open_tokenizer(words), []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: calls.append(text) or encode(text)
    list(Documents(open_source([path], tokenizer=tokenizer), Packing(16, "windows", 2), epochs=1))
    assert len(calls) == 40


# Tables: pyarrow, where it is installed.


@pytest.fixture
def table():
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow, pyarrow.table({"text": TEXTS, "ids": [[n, 5] for n in range(len(TEXTS))]})


def test_parquet_and_arrow(tmp_path, table):
    pyarrow, content = table
    parquet, feather = (pytest.importorskip(f"pyarrow.{name}") for name in ("parquet", "feather"))
    parquet.write_table(content, tmp_path / "a.parquet", row_group_size=2)
    feather.write_feather(content, tmp_path / "b.feather")
    with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), content.schema) as stream:
        stream.write_table(content, max_chunksize=4)
    assert all_of(open_source([tmp_path])) == 3 * encoded(TEXTS)
    for name in ("a.parquet", "c.arrow"):
        assert all_of(open_source([tmp_path / name], field="ids")) == [[n, 5] for n in range(len(TEXTS))]
        with pytest.raises(ValueError, match="has no column 'words', but 'text', 'ids'"):
            open_source([tmp_path / name], field="words")
        (tmp_path / name).write_bytes(b"no table")
        with pytest.raises(ValueError, match="cannot be read"):
            open_source([tmp_path / name])


def test_a_folder_that_datasets_saved(tmp_path, table):
    pyarrow, content = table
    for name in ("data-1.arrow", "cache-7.arrow", "data-0.arrow"):
        with pyarrow.ipc.new_stream(str(tmp_path / name), content.schema) as stream:
            stream.write_table(content.slice(0, 1 if name == "data-1.arrow" else 3))
    state = {"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert all_of(open_source([tmp_path])) == encoded([*TEXTS[:1], *TEXTS[:3]])


def test_without_pyarrow_tables_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="needs the package pyarrow: pip install pyarrow"):
        open_source([tmp_path])
