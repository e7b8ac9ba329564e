"""The corpus holds every byte once, in an order that follows from the seed, in sequences that are not too long."""

import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.corpus import Document, index, named_files, open_corpus, pack, read, standard_library


def documents_of(sizes: list[int]) -> list[Document]:
    return [Document(Path(f"file {number}"), 0, size) for number, size in enumerate(sizes)]


SIZES = st.lists(st.integers(0, 40), max_size=30)


@given(SIZES, st.integers(1, 25), st.integers(0, 3))
def test_every_byte_comes_once(sizes: list[int], tokens: int, seed: int) -> None:
    files = documents_of(sizes)
    sequences = pack(files, tokens, seed)
    found = [(part.path, part.start + i) for sequence in sequences for part in sequence for i in range(part.size)]
    assert sorted(found) == sorted((file.path, i) for file in files for i in range(file.size))


@given(SIZES, st.integers(1, 25), st.integers(0, 3))
def test_no_sequence_is_too_long_and_no_empty_document_is_lost(sizes: list[int], tokens: int, seed: int) -> None:
    sequences = pack(documents_of(sizes), tokens, seed)
    assert all(sum(part.size for part in sequence) <= tokens for sequence in sequences)
    assert sum(part.size == 0 for sequence in sequences for part in sequence) == sizes.count(0)


@given(SIZES, st.integers(1, 25))
def test_only_documents_that_do_not_fit_are_cut(sizes: list[int], tokens: int) -> None:
    parts = [part for sequence in pack(documents_of(sizes), tokens, 0) for part in sequence]
    whole = [part for part in parts if part.start == 0 and part.size == sizes[int(part.path.name.split()[1])]]
    assert len(whole) == sum(size <= tokens for size in sizes)


def test_the_order_follows_from_the_seed_alone() -> None:
    files = documents_of([random.Random(1).randrange(100) for _ in range(50)])
    first = pack(files, 300, seed=7)
    random.seed(99)
    assert pack(files, 300, seed=7) == first
    assert pack(files, 300, seed=8) != first


def test_sequences_are_nearly_full() -> None:
    files = index(standard_library())
    sequences = pack(files, 8192, seed=0)
    assert sum(file.size for file in files) > 0.9 * 8192 * len(sequences)


def test_reading_gives_the_bytes_of_the_parts(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(100)
    path = tmp_path / "bytes"
    path.write_bytes(content)
    tokens, lengths = read([Document(path, 40, 7), Document(path, 0, 0), Document(path, 95, 5)])
    assert tokens.tolist() == [list(content[40:47] + content[95:])]
    assert lengths == [7, 0, 5]
    empty, _ = read([Document(path, 0, 0)])
    assert empty.shape == (1, 0)


def test_the_standard_library_has_no_installed_packages() -> None:
    files = standard_library()
    assert files == sorted(files) and len(set(files)) == len(files) > 500
    assert all(file.suffix == ".py" and "site-packages" not in file.parts for file in files)
    assert Path(sysconfig.get_path("stdlib")) / "argparse.py" in files


def test_named_directories_are_walked_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.bin", ".git/config", "a/.hidden", "c/empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "c/empty" else b"x")
    found = named_files([str(tmp_path / "b.txt"), str(tmp_path)])
    assert [file.relative_to(tmp_path).as_posix() for file in found] == ["b.txt", "a/z.bin", "c/empty"]


def test_it_starts_again_after_the_last_sequence(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"0123456789")
    corpus = open_corpus([str(tmp_path)], tokens=4, seed=0)
    assert len(corpus.sequences) == 3
    assert corpus.step(1, 2) == [corpus.sequences[2], corpus.sequences[0]]


def test_longer_documents_can_be_left_out(tmp_path: Path) -> None:
    for size in (0, 3, 7, 8, 20):
        (tmp_path / str(size)).write_bytes(b"x" * size)
    corpus = open_corpus([str(tmp_path)], tokens=5, seed=0, longest=7)
    assert sorted(file.size for file in corpus.files) == [0, 3, 7]
    assert sorted(part.size for sequence in corpus.sequences for part in sequence) == [0, 2, 3, 5]
    with pytest.raises(ValueError, match="holds no bytes in 1 files"):
        open_corpus([str(tmp_path)], tokens=5, seed=0, longest=2)


def test_wrong_data_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data .*nowhere: no such file or directory"):
        open_corpus([str(tmp_path / "nowhere")], 8, 0)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="holds no bytes in 1 files"):
        open_corpus([str(tmp_path)], 8, 0)
    with pytest.raises(ValueError, match="became shorter"):
        read([Document(tmp_path / "empty", 0, 3)])
