"""Files that commands write are whole or not there: tried before the work, written beside, renamed."""

import errno
import io
import os
import stat

import pytest

from seqpar.commands.main import main
from seqpar.commands.written import try_to_write, write


class HalfFull(io.FileIO):
    """A file on a disk that is full after the first 5 bytes."""

    def write(self, data, /):
        super().write(bytes(data)[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """What is written beside meets the end of the disk half-way."""
    monkeypatch.setattr(os, "fdopen", lambda descriptor, mode: HalfFull(descriptor, mode))


def test_content_mode_and_links_are_kept(tmp_path):
    target, link = tmp_path / "costs.json", tmp_path / "link.json"
    write(target, "new ü")
    assert target.read_bytes() == "new ü".encode()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    target.chmod(0o604)
    link.symlink_to(target.name)
    write(link, b"newer")
    assert link.is_symlink() and target.read_bytes() == b"newer" and stat.S_IMODE(target.stat().st_mode) == 0o604
    assert sorted(os.listdir(tmp_path)) == ["costs.json", "link.json"]


def test_a_file_is_never_seen_in_half(tmp_path):
    """Whoever has the old file open keeps it: the new one is another."""
    target = tmp_path / "a"
    target.write_text("old")
    with target.open() as reader:
        write(target, "new")
        assert reader.read() == "old" and target.read_text() == "new"


@pytest.mark.parametrize("older", [None, "good and long"])
def test_a_full_disk_leaves_the_older_file_and_nothing_beside(tmp_path, full_disk, older):
    target = tmp_path / "costs.json"
    if older is not None:
        target.write_text(older)
    with pytest.raises(ValueError, match=r"cannot write .*costs\.json: No space left on device"):
        write(target, "0123456789")
    assert os.listdir(tmp_path) == ([] if older is None else ["costs.json"])
    assert older is None or target.read_text() == older


@pytest.mark.parametrize("attempt", [try_to_write, lambda path: write(path, "x")], ids=["try", "write"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no/such/file", "No such file or directory"),
        (".", "Is a directory|Not a directory"),
        ("x" * 300, "File name too long"),
        ("loop", "symbolic links|No such file|File exists"),
        ("a\0b", "null"),
    ],
)
def test_names_that_cannot_be_written_are_one_line(tmp_path, monkeypatch, attempt, name, why):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    with pytest.raises(ValueError, match=f"cannot write .*: .*({why})") as refused:
        attempt(name)
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["loop"]


def test_trying_changes_nothing(tmp_path):
    target = tmp_path / "a"
    try_to_write(target)
    assert os.listdir(tmp_path) == []
    target.write_text("old")
    before = target.stat()
    try_to_write(target)
    assert target.read_text() == "old" and target.stat() == before


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    try_to_write("/dev/null")
    write("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    try_to_write("/dev/full")
    with pytest.raises(ValueError, match="cannot write /dev/full: No space left on device"):
        write("/dev/full", "x")


LENGTHS = "48000\n100000\n48000\n"
BUFFERS = "id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\n"
COMMANDS = {
    "plan": ["--lengths", "lengths.txt", "--model", "gpt-7b-384k", "--cluster", "64xA100-40G", "--seconds", "0.1"],
    "place": ["buffers.csv"],
    "layers": ["--pattern", "gla softmax"],
    "memory": ["--model", "llama-1b", "--tokens", "4K", "--swap", "memo"],
}
OUT = {"plan": "--plot", "place": "--plot", "memory": "--plot", "layers": "--costs"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_leaves_the_older_file_on_a_full_disk(command, tmp_path, monkeypatch, capsys, full_disk):
    if OUT[command] == "--plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "lengths.txt").write_text(LENGTHS)
    (tmp_path / "buffers.csv").write_text(BUFFERS)
    older = tmp_path / "out.svg"
    older.write_text("good")
    monkeypatch.chdir(tmp_path)
    assert main([command, *COMMANDS[command], OUT[command], "out.svg"]) == 2
    said = capsys.readouterr()
    assert said.err == f"seqpar {command}: cannot write out.svg: No space left on device\n" and said.out == ""
    assert older.read_text() == "good" and sorted(os.listdir(tmp_path)) == ["buffers.csv", "lengths.txt", "out.svg"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tries_before_it_works(command, tmp_path, monkeypatch, capsys):
    """The input is not there either: what is said is that the output cannot be."""
    if command in ("plan", "place"):
        monkeypatch.chdir(tmp_path)
    assert main([command, *COMMANDS[command], OUT[command], "/no/folder/out.svg"]) == 2
    assert "cannot write /no/folder/out.svg: No such file or directory" in capsys.readouterr().err
